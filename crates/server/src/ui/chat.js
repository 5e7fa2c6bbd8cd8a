// A small chat over /api/chat.

import { $, NeedsKey, ask, count, el, pace, say, span } from "./common.js";

export class Chat {
  /** What was said, as the server is told it. */
  #messages = [];
  /** Ends the answer that is being written. */
  #stop = null;
  #loaded = [];
  #names = [];

  constructor() {
    $("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.#send();
      }
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#stop?.abort();
    });
    $("stop").addEventListener("click", () => {
      this.#stop?.abort();
      $("prompt").focus();
    });
    $("clear").addEventListener("click", () => {
      this.#stop?.abort();
      this.#messages = [];
      $("log").replaceChildren();
      $("prompt").focus();
    });
    this.list();
  }

  /** The models of these names are loaded. */
  loaded(names) {
    this.#loaded = names;
    if (names.some((name) => !this.#names.includes(name))) this.#offer([...this.#names, ...names]);
    const select = $("model");
    if (!select.dataset.chosen && names.length && !names.includes(select.value)) select.value = names.at(-1);
  }

  /** Asks what models there are. */
  async list() {
    try {
      const response = await ask("api/tags");
      const { models } = await response.json();
      this.#offer([...models.map((model) => model.name), ...this.#loaded]);
    } catch (error) {
      // Without the list there are those that are loaded; the state tells whether the server is there.
      if (!(error instanceof NeedsKey)) this.#offer(this.#loaded);
    }
  }

  #offer(names) {
    this.#names = [...new Set(names)];
    const select = $("model");
    const before = select.value;
    select.replaceChildren(...this.#names.map((name) => el("option", {}, name)));
    if (this.#names.includes(before)) select.value = before;
    select.onchange = () => (select.dataset.chosen = "yes");
  }

  async #send() {
    const text = $("prompt").value.trim();
    const model = $("model").value;
    if (!text || !model || this.#stop) return;
    $("prompt").value = "";
    // Another one begins when this one is cleared, perhaps while it is answered.
    const messages = this.#messages;
    messages.push({ role: "user", content: text });
    this.#add("You", "user").append(text);
    const answer = this.#add(model, "model");
    this.#busy(new AbortController());
    const reply = { content: "", thinking: "" };
    const waits = el("span", { class: "waits" }, this.#loaded.includes(model) ? "Waiting" : `Loading ${model}`);
    answer.append(waits);
    try {
      const end = await this.#receive(model, reply, (part) => {
        waits.remove();
        this.#show(answer, part);
      });
      this.#after(answer, end);
      say($("said"), `${model}: ${reply.content || "no answer"}`);
    } catch (error) {
      waits.remove();
      const stopped = error.name === "AbortError";
      answer.append(el("span", { class: stopped ? "waits" : "wrong" }, stopped ? "Stopped" : error.message));
      say($("said"), stopped ? "Stopped" : `Failed: ${error.message}`);
    }
    const { content } = reply;
    if (content) messages.push({ role: "assistant", content });
    else messages.pop();
    this.#busy(null);
  }

  #busy(stop) {
    this.#stop = stop;
    $("stop").hidden = !stop;
    $("send").hidden = Boolean(stop);
    $("log").setAttribute("aria-busy", String(Boolean(stop)));
    if (stop) say($("said"), "Answering");
  }

  /** Reads the lines of an answer; returns the last. */
  async #receive(model, reply, show) {
    const body = JSON.stringify({ model, messages: this.#messages });
    const response = await ask("api/chat", { method: "POST", body, signal: this.#stop.signal, headers: { "Content-Type": "application/json" } });
    if (!response.ok) {
      const told = await response.json().catch(() => ({}));
      throw new Error(told.error ?? `the server answers with ${response.status}`);
    }
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Error("the answer broke off");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.filter(Boolean).map((line) => JSON.parse(line))) {
        if (line.error) throw new Error(line.error);
        const { content = "", thinking = "" } = line.message ?? {};
        reply.content += content;
        reply.thinking += thinking;
        if (content || thinking) show({ content, thinking });
        if (line.done) return line;
      }
    }
  }

  #add(who, kind) {
    const text = el("div", { class: "text" });
    $("log").append(el("li", { class: kind }, el("h3", {}, who), text));
    $("log").scrollTop = $("log").scrollHeight;
    return text;
  }

  /** Adds a part of the reply; what it thinks goes before. */
  #show(answer, { content, thinking }) {
    const log = $("log");
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    if (thinking) {
      if (!answer.querySelector("details")) answer.prepend(el("details", {}, el("summary", {}, "Thinking"), el("div")));
      answer.querySelector("details > div").append(thinking);
    }
    answer.append(content);
    if (follows) log.scrollTop = log.scrollHeight;
  }

  #after(answer, { eval_count: written = 0, eval_duration: took = 0, total_duration: all = 0, load_duration: load = 0 }) {
    const parts = [`${count(written)} tokens`];
    if (took > 0) parts.push(`${pace((written / took) * 1e9)} per second`);
    if (load > 1e8) parts.push(`${span(load / 1e9)} to load`);
    else if (all > 0) parts.push(span(all / 1e9));
    answer.parentElement.append(el("p", { class: "more" }, parts.join(" · ")));
    $("log").scrollTop = $("log").scrollHeight;
  }
}
