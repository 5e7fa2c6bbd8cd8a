// The page's figures: asks for the state once a second, and shows what it is and what has changed.

import { $, NeedsKey, ask, bytes, count, el, pace, percent, rate, say, span } from "./common.js";
import { Chat } from "./chat.js";
import { ExpertMap } from "./experts.js";

const POLL_MS = 1000;
/** How far the page looks back, seconds. */
const WINDOW_S = 60;
/** Over how long a rate is taken, seconds. */
const RATE_S = 3;

const TIERS = [["vram", "VRAM"], ["ram", "RAM"], ["drive", "Drive"]];

const chat = new Chat();
const map = new ExpertMap();
/** Names the load of the model that is shown, if the user has chosen it. */
let chosen = null;
/** What was seen of it, oldest first. */
let seen = [];
/** The most that was seen of a way, bytes per second, by its name. */
let best = {};
let run = null;

async function poll() {
  try {
    const response = await ask("ui/state", { signal: AbortSignal.timeout(10_000) });
    if (!response.ok) throw new Error(`status ${response.status}`);
    show(await response.json());
    link("live", "Live");
  } catch (error) {
    if (error instanceof NeedsKey) link("waiting", "A key is wanted");
    else link("gone", "No answer from the server");
  }
}

function link(is, text) {
  $("link").dataset.is = is;
  say($("link"), text);
}

function show(state) {
  say($("version"), state.version);
  if (run !== state.run) [run, seen, best] = [state.run, [], {}];
  chat.loaded(state.models.map((model) => model.name));
  const names = state.models.map((model) => model.load);
  if (!names.includes(chosen)) chosen = names.at(-1) ?? null;
  showModels(state.models);
  const model = state.models.find((model) => model.load === chosen);
  const streams = Boolean(model?.layers.length);
  for (const [id, there] of [["now", model], ["tiers", streams], ["experts", streams], ["held", model && !streams]]) {
    $(id).hidden = !there;
  }
  showNotes(model?.notes ?? []);
  if (!model) return;
  look(model, state.time);
  showNow(model);
  if (!streams) return;
  showPools(model);
  map.show(model, seen);
}

/** Keeps what is needed of this state to tell later what has changed since. */
function look(model, time) {
  if (seen.at(-1)?.load !== model.load) seen = [];
  const layers = model.layers.map(({ vram, ram, drive }) => ({ vram, ram, drive }));
  const sum = (tier) => layers.reduce((all, layer) => all + layer[tier], 0);
  seen.push({
    load: model.load,
    time,
    written: model.tokens.written,
    prompt: model.tokens.prompt,
    drive: model.drive.bytes,
    gpu: model.gpu?.bytes ?? 0,
    found: { vram: sum("vram"), ram: sum("ram"), drive: sum("drive") },
    layers,
    uses: model.layers.map((layer) => layer.uses),
  });
  while (seen.length > 2 && time - seen[0].time > WINDOW_S) seen.shift();
  // Only the last two are compared expert by expert.
  if (seen.length > 2) delete seen.at(-3).uses;
}

/** The first that was seen within so many seconds of the last. */
const since = (seconds) => seen.find((one) => seen.at(-1).time - one.time <= seconds + 0.5);

/** How much of something came per second lately. */
function perSecond(key) {
  const [first, last] = [since(RATE_S), seen.at(-1)];
  return last.time > first.time ? (last[key] - first[key]) / (last.time - first.time) : 0;
}

/** The same for each pair of states. */
const series = (value) => seen.slice(1).map((one, i) => value(seen[i], one, one.time - seen[i].time));

function showModels(models) {
  const list = $("models");
  $("no-model").hidden = models.length > 0;
  list.hidden = models.length === 0;
  const loads = models.map((model) => model.load).join();
  if (list.dataset.loads !== loads) {
    list.dataset.loads = loads;
    list.replaceChildren(...models.map(row));
  }
  models.forEach((model, i) => {
    const [radio, name, what, work] = list.children[i].children;
    radio.checked = model.load === chosen;
    radio.hidden = models.length === 1;
    say(name, model.name);
    const memory = [[model.vram_bytes, "VRAM"], [model.ram_bytes, "RAM"]].filter(([n]) => n > 0);
    const taken = memory.map(([n, tier]) => `${bytes(n)} ${tier}`).join(" + ");
    const kind = [model.architecture, model.parameters, model.quantization].filter((text) => text !== "unknown");
    say(what, [...kind, `${count(model.context_tokens)} tokens of context`, taken].join(" · "));
    const { all, busy, waiting } = model.sequences;
    const rests = model.rests_seconds === null ? "stays" : busy + waiting > 0 ? "" : `rests in ${span(model.rests_seconds)}`;
    say(work, [`${busy} of ${all} sequences busy`, waiting ? `${waiting} waiting` : "", rests].filter(Boolean).join(" · "));
  });
}

function row(model) {
  const radio = el("input", { type: "radio", name: "shown", value: String(model.load) });
  radio.addEventListener("change", () => {
    [chosen, seen, best] = [model.load, [], {}];
    poll();
  });
  return el("label", {}, radio, el("b"), el("span", { class: "what" }), el("span", { class: "work" }));
}

function showNow(model) {
  const figure = (id, value, more) => {
    say($(id).querySelector(".value"), value);
    say($(id).querySelector(".more"), more);
  };
  const prompt = perSecond("prompt");
  figure("written", pace(perSecond("written")), prompt >= 1 ? `and ${pace(prompt)} of prompts` : `${count(model.tokens.written)} written since it was loaded`);
  line("written", series((a, b, s) => (b.written - a.written) / s));

  const of = (a, b) => TIERS.map(([tier]) => b.found[tier] - a.found[tier]);
  const share = ([vram, ram, drive]) => (vram + ram) / (vram + ram + drive);
  const minute = of(seen[0], seen.at(-1));
  const asked = minute.reduce((a, b) => a + b);
  $("found").hidden = model.layers.length === 0;
  figure("found", asked ? percent(share(minute)) : "–", asked ? `of ${count(asked)} requests in the last minute` : "no requests in the last minute");
  line("found", series((a, b) => share(of(a, b))), 1);

  way("drive", model.drive.limit_bytes_per_second, "measured");
  $("gpu").hidden = !model.gpu;
  if (model.gpu) way("gpu", model.gpu.limit_bytes_per_second, "of the link");

  function way(id, limit, limitIs) {
    const now = perSecond(id);
    best[id] = Math.max(best[id] ?? 0, ...series((a, b, s) => (b[id] - a[id]) / s));
    const most = limit ?? best[id];
    const share = most > 0 ? Math.min(now / most, 1) : 0;
    figure(id, rate(now), limit ? `of ${rate(limit)} ${limitIs}` : most > 0 ? `limit not known; best seen here ${rate(most)}` : "limit not known");
    const meter = $(id).querySelector(".meter");
    meter.setAttribute("aria-valuenow", String(Math.round(share * 100)));
    meter.setAttribute("aria-valuetext", `${rate(now)}, ${$(id).querySelector(".more").textContent}`);
    meter.firstChild.style.width = `${share * 100}%`;
  }
}

/** Draws the last minute; its right end is now. It has a gap where there is no number. */
function line(id, values, most = Math.max(...values, 1)) {
  const x = (i) => WINDOW_S - values.length + 1 + i;
  const y = (value) => (19 - (value / most) * 18).toFixed(1);
  const at = (value, i) => (Number.isNaN(value) ? "" : `${i > 0 && !Number.isNaN(values[i - 1]) ? "L" : "M"}${x(i)},${y(value)}`);
  $(id).querySelector("path").setAttribute("d", values.map(at).join(""));
}

function showPools(model) {
  const list = $("pools");
  const pool = (tier) => model.pools.find((pool) => pool.tier === tier);
  const tiers = TIERS.filter(([tier]) => tier === "drive" || pool(tier));
  const names = tiers.map(([tier]) => tier).join();
  if (list.dataset.tiers !== names) {
    list.dataset.tiers = names;
    list.replaceChildren(...tiers.map(([tier, name]) =>
      el("div", { class: tier }, el("dt", {}, name), el("dd", {}, el("i", { "aria-hidden": "true" }, el("i")), el("span"), el("span")))));
  }
  const found = (tier) => seen.at(-1).found[tier] - seen[0].found[tier];
  const asked = TIERS.reduce((all, [tier]) => all + found(tier), 0);
  tiers.forEach(([tier], i) => {
    const [bar, size, requests] = list.children[i].lastChild.children;
    const { bytes: room, filled_bytes: filled } = pool(tier) ?? { bytes: model.expert_bytes, filled_bytes: model.expert_bytes };
    const all = Math.max(model.expert_bytes, ...model.pools.map((pool) => pool.bytes));
    bar.style.width = `${(room / all) * 100}%`;
    bar.firstChild.style.width = `${Math.min(filled / room, 1) * 100}%`;
    const share = percent(room / model.expert_bytes);
    say(size, tier === "drive" ? `all experts, ${bytes(room)}` : filled < room ? `${bytes(filled)} of ${bytes(room)} filled` : `${bytes(room)}, full: ${share} of the experts`);
    say(requests, asked ? `${percent(found(tier) / asked)} of requests` : "");
  });
}

function showNotes(notes) {
  $("notes").hidden = notes.length === 0;
  const text = notes.join("\n");
  const list = $("notes").querySelector("ul");
  if (list.dataset.text === text) return;
  list.dataset.text = text;
  list.replaceChildren(...notes.map((note) => el("li", {}, note)));
}

/** One question after the other, none while nobody looks. */
async function watch() {
  for (;;) {
    if (!document.hidden && !$("key").open) await poll();
    await new Promise((done) => setTimeout(done, POLL_MS));
  }
}

addEventListener("key", () => chat.list());
watch();
