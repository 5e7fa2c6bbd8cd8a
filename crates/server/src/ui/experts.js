// Layers times experts as a heat map, with where each layer's experts were found, and the same as a table.

import { $, count, el, percent, say } from "./common.js";

/** After so long a request counts half, seconds. */
const HALF_LIFE_S = 5;
/** As much for the scale, which so follows a slowing chat late: the map fades. */
const SCALE_HALF_LIFE_S = 12;

const TIERS = ["vram", "ram", "drive"];
const FONT = "11px system-ui, sans-serif";
const HEAD = 18;
const GAP = 10;

export class ExpertMap {
  #canvas = $("map");
  #model = null;
  /** Requests by layer and expert, fading. */
  #heat = [];
  #most = 1;
  /** By layer, what was found where in the last minute. */
  #minute = [];
  /** What the keys or the pointer have chosen. */
  #at = null;
  #place = null;

  constructor() {
    new ResizeObserver(() => this.#draw()).observe(this.#canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
    this.#canvas.addEventListener("keydown", (event) => this.#key(event));
    this.#canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.#canvas.addEventListener("pointerleave", () => this.#choose(null));
    this.#canvas.addEventListener("blur", () => this.#choose(null));
    $("table").addEventListener("toggle", () => this.#table());
  }

  /** Shows a model's layers; `seen` is what was seen of it, the last one now. */
  show(model, seen) {
    const isOther = this.#heat.length !== model.layers.length || model.layers.some((layer, i) => layer.uses.length !== this.#heat[i].length);
    if (this.#model?.load !== model.load || isOther || seen.length < 2) {
      this.#heat = model.layers.map((layer) => new Float32Array(layer.uses.length));
      this.#most = 1;
      this.#at = null;
    }
    this.#model = model;
    if (seen.length >= 2) this.#warm(seen.at(-2), seen.at(-1));
    const [first, last] = [seen[0].layers, seen.at(-1).layers];
    this.#minute = last.map((layer, i) => Object.fromEntries(TIERS.map((tier) => [tier, layer[tier] - first[i][tier]])));
    for (const tier of TIERS) {
      const isThere = tier === "drive" || model.pools.some((pool) => pool.tier === tier);
      document.querySelector(`.swatches .${tier}`).hidden = !isThere;
    }
    this.#draw();
    this.#summarize();
    this.#table();
    this.#tell();
  }

  #warm(before, now) {
    const seconds = now.time - before.time;
    const kept = 0.5 ** (seconds / HALF_LIFE_S);
    let most = 0;
    this.#heat.forEach((heat, layer) => {
      const [old, uses] = [before.uses[layer], now.uses[layer]];
      for (let expert = 0; expert < heat.length; expert += 1) {
        // The counts are modulo 2^32.
        heat[expert] = heat[expert] * kept + ((uses[expert] - old[expert]) >>> 0);
        most = Math.max(most, heat[expert]);
      }
    });
    this.#most = Math.max(most, this.#most * 0.5 ** (seconds / SCALE_HALF_LIFE_S), 1);
  }

  #draw() {
    const canvas = this.#canvas;
    const width = canvas.parentElement.clientWidth;
    if (!this.#model || width === 0) return;
    const layers = this.#model.layers;
    const experts = Math.max(1, ...layers.map((layer) => layer.uses.length));
    const row = layers.length <= 16 ? 16 : layers.length <= 32 ? 11 : layers.length <= 64 ? 7 : 5;
    const [left, share] = [26, 38];
    const bar = Math.min(Math.max(width * 0.16, 48), 130);
    const place = { left, top: HEAD, row, cell: (width - left - bar - share - GAP) / experts, experts };
    this.#place = place;

    const dots = devicePixelRatio || 1;
    const height = HEAD + layers.length * row;
    canvas.width = Math.round(width * dots);
    canvas.height = Math.round(height * dots);
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d");
    pen.scale(dots, dots);
    pen.font = FONT;
    pen.textBaseline = "middle";
    const style = getComputedStyle(canvas);
    const color = (name) => style.getPropertyValue(`--${name}`).trim();
    const ramp = [0, 1, 2, 3, 4].map((n) => rgb(color(`heat-${n}`)));
    const [words, quiet, text] = [color("muted"), color("heat-0"), color("text")];
    const snap = (x) => Math.round(x * dots) / dots;
    const between = (size) => (size >= 6 ? 1 : size >= 3 ? 1 / dots : 0);

    const bars = width - bar - share;
    pen.fillStyle = words;
    pen.fillText("0", left, HEAD / 2 - 2);
    const last = String(experts - 1);
    pen.textAlign = "right";
    pen.fillText(last, left + place.cell * experts, HEAD / 2 - 2);
    pen.textAlign = "center";
    pen.fillText("expert", left + (place.cell * experts) / 2, HEAD / 2 - 2);
    pen.textAlign = "right";
    pen.fillText("in memory", width, HEAD / 2 - 2);

    const every = Math.ceil(15 / row);
    layers.forEach((layer, i) => {
      const y = HEAD + i * row;
      const tall = row - between(row);
      if (i % every === 0) {
        pen.fillStyle = words;
        pen.textAlign = "right";
        pen.fillText(String(layer.block), left - 8, y + row / 2);
      }
      const heat = this.#heat[i] ?? [];
      if (heat.length === 0) {
        pen.fillStyle = quiet;
        pen.fillRect(left, y + tall / 2, place.cell * experts, 1);
      }
      for (let expert = 0; expert < heat.length; expert += 1) {
        const from = snap(left + expert * place.cell);
        const to = snap(left + (expert + 1) * place.cell) - between(place.cell);
        pen.fillStyle = shade(ramp, Math.sqrt(heat[expert] / this.#most));
        pen.fillRect(from, y, Math.max(to - from, 1 / dots), tall);
      }
      const minute = this.#minute[i];
      const asked = minute.vram + minute.ram + minute.drive;
      pen.fillStyle = quiet;
      pen.fillRect(bars, y, bar, tall);
      let x = bars;
      for (const tier of TIERS) {
        const wide = asked ? (minute[tier] / asked) * bar : 0;
        pen.fillStyle = color(tier);
        pen.fillRect(snap(x), y, snap(x + wide) - snap(x), tall);
        x += wide;
      }
      if (asked && i % every === 0) {
        pen.fillStyle = words;
        pen.textAlign = "right";
        pen.fillText(`${Math.floor(((minute.vram + minute.ram) / asked) * 100)} %`, width, y + row / 2);
      }
    });
    if (this.#at) {
      const [layer, expert] = this.#at;
      pen.strokeStyle = text;
      pen.lineWidth = 1.5;
      pen.strokeRect(left + expert * place.cell - 1, HEAD + layer * row - 1, Math.max(place.cell, 3) + 1, row + 1);
    }
  }

  /** The layers' minute, and the expert that is busiest now. */
  #summarize() {
    const sum = (tier) => this.#minute.reduce((all, layer) => all + layer[tier], 0);
    const [vram, ram, drive] = TIERS.map(sum);
    const asked = vram + ram + drive;
    const looks = this.#heat.some((heat) => heat.length > 0);
    const shape = looks
      ? `${this.#heat.length} layers of ${Math.max(...this.#heat.map((heat) => heat.length))} experts.`
      : `${this.#heat.length} layers. All experts are in place, so nobody looks which ones are used.`;
    if (asked === 0) return say($("summary"), `${shape} No requests in the last minute.`);
    const layers = this.#minute.map((layer, i) => [layer.drive, i]).filter(([n]) => n > 0);
    const worst = layers.length ? ` Layer ${this.#model.layers[layers.reduce((a, b) => (b[0] > a[0] ? b : a))[1]].block} reads most.` : "";
    say($("summary"), `${shape} In the last minute ${count(asked)} requests, of which ${count(drive)} had to be read.${worst}`);
  }

  #table() {
    if (!$("table").open || !this.#model) return;
    const body = $("table").querySelector("tbody");
    const layers = this.#model.layers;
    if (body.children.length !== layers.length) {
      body.replaceChildren(...layers.map(() => el("tr", {}, el("th", { scope: "row" }), ...Array.from({ length: 6 }, () => el("td")))));
    }
    layers.forEach((layer, i) => {
      const { vram, ram, drive } = this.#minute[i];
      const asked = vram + ram + drive;
      const heat = this.#heat[i];
      const busiest = heat.reduce((at, value, expert) => (value > (heat[at] ?? 0) ? expert : at), -1);
      const texts = [layer.block, count(asked), count(vram), count(ram), count(drive), asked ? percent((vram + ram) / asked) : "–", busiest < 0 ? "–" : busiest];
      texts.forEach((text, column) => say(body.children[i].children[column], String(text)));
    });
  }

  #choose(at) {
    if (String(at) === String(this.#at)) return;
    this.#at = at;
    this.#draw();
    this.#tell();
  }

  /** Reads out the chosen expert. */
  #tell() {
    const [layer, expert] = this.#at ?? [];
    const shown = this.#model?.layers[layer];
    const total = shown?.uses[expert];
    if (total === undefined) return say($("cell"), "");
    const lately = this.#heat[layer][expert];
    const how = lately >= 0.5 ? `about ${count(lately)} of them just now` : "none just now";
    say($("cell"), `Layer ${shown.block}, expert ${expert}: ${count(total)} requests since the model was loaded, ${how}`);
  }

  #key(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -1e9], End: [0, 1e9], PageUp: [-1e9, 0], PageDown: [1e9, 0] };
    if (event.key === "Escape") this.#choose(null);
    const step = steps[event.key];
    if (!step || !this.#place || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const within = (n, size) => Math.min(Math.max(n, 0), size - 1);
    const [layer, expert] = this.#at ?? [0, 0];
    const next = this.#at ? [layer + step[0], expert + step[1]] : [0, 0];
    this.#choose([within(next[0], this.#model.layers.length), within(next[1], this.#place.experts)]);
  }

  #point(event) {
    if (!this.#place || event.pointerType === "touch") return;
    const { left, top, row, cell, experts } = this.#place;
    const box = this.#canvas.getBoundingClientRect();
    const expert = Math.floor((event.clientX - box.left - left) / cell);
    const layer = Math.floor((event.clientY - box.top - top) / row);
    const inside = expert >= 0 && expert < experts && layer >= 0 && layer < this.#model.layers.length;
    this.#choose(inside ? [layer, expert] : null);
  }
}

/** The three parts of `#rrggbb`. */
const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

/** A color of the ramp, 0 to 1. */
function shade(ramp, value) {
  const place = Math.min(Math.max(value, 0), 1) * (ramp.length - 1);
  const low = Math.min(Math.floor(place), ramp.length - 2);
  const mixed = ramp[low].map((part, i) => Math.round(part + (ramp[low + 1][i] - part) * (place - low)));
  return `rgb(${mixed.join(" ")})`;
}
