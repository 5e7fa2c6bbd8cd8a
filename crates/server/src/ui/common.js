// What the parts of the page share: elements, how figures read, and the way to the server.

export const $ = (id) => document.getElementById(id);

/** An element with attributes and children. */
export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Sets a text, where it is another one: what is read out or selected stays. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const count = (n) => whole.format(n);

const significant = (n) => (n >= 99.95 || n === 0 ? n.toFixed(0) : n >= 9.995 ? n.toFixed(1) : n.toFixed(2));

/** Bytes of memory: `1.50 GiB`. */
export function bytes(n) {
  const [unit, size] = n >= 2 ** 30 ? ["GiB", 2 ** 30] : n >= 2 ** 20 ? ["MiB", 2 ** 20] : ["KiB", 2 ** 10];
  return `${significant(n / size)} ${unit}`;
}

/** Bytes per second: `1.50 GB/s`. */
export function rate(n) {
  const [unit, size] = n >= 1e9 ? ["GB/s", 1e9] : ["MB/s", 1e6];
  return `${significant(n / size)} ${unit}`;
}

export const percent = (share) => `${(share * 100).toFixed(share > 0.9945 && share < 1 ? 1 : 0)} %`;

/** Tokens per second. */
export const pace = (n) => (n >= 99.5 || n === 0 ? n.toFixed(0) : n.toFixed(1));

/** A span of time, roughly. */
export function span(seconds) {
  if (seconds < 90) return `${Math.ceil(seconds)} s`;
  if (seconds < 90 * 60) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 3600)} h`;
}

/** The server wants a key, and the user is being asked for it. */
export class NeedsKey extends Error {}

const KEY = "tierstream-key";

/** Asks the server, with the user's key if there is one. */
export async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  const response = await fetch(path, { ...options, headers });
  if (response.status !== 401) return response;
  wantKey(key);
  throw new NeedsKey("the server wants an API key");
}

function wantKey(refused) {
  const dialog = $("key");
  if (refused && sessionStorage.getItem(KEY) === refused) {
    sessionStorage.removeItem(KEY);
    say($("key-why"), "The server does not know that key. It is one of those of --api-keys, and is kept until this tab is closed.");
  }
  if (!dialog.open) dialog.showModal();
}

$("key").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("key-text").value.trim();
  // Headers take no others.
  if (!/^[\x20-\x7e]+$/.test(key)) return;
  sessionStorage.setItem(KEY, key);
  $("key-text").value = "";
  $("key").close();
  dispatchEvent(new Event("key"));
});
