// Pages by address, the session, and the live events that all pages share.

import { ask, h, may, say, state, field } from "./base.js";
import * as audit from "./audit.js";
import * as coverage from "./coverage.js";
import * as feeds from "./feeds.js";
import * as history_ from "./history.js";
import * as incident from "./incident.js";
import * as review from "./review.js";
import * as wall from "./wall.js";

const PAGES = { "": wall, history: history_, review, coverage, feeds, audit, incident };
const DEAF_MS = 16000; // three beats missed: what is shown may no longer hold

let page = null;
let events = null;
let heard = 0;

const main = document.getElementById("main");

async function show() {
  const [name, ...rest] = location.pathname.split("/").filter(Boolean);
  const found = PAGES[name ?? ""] ?? wall;
  page?.leave?.();
  page = null;
  main.replaceChildren();
  for (const link of document.querySelectorAll("nav a")) {
    link.toggleAttribute("hidden", Boolean(link.dataset.role) && !may(link.dataset.role));
    if (link.dataset.page === (name ?? "wall")) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (!state.session?.name) return login();
  page = found;
  document.title = `${found.title} – Unmask`;
  try {
    await found.enter(main, rest.map(decodeURIComponent));
  } catch (error) {
    main.append(h("p", { class: "error", role: "alert" }, error.message));
  }
}

export function go(path) {
  history.pushState(null, "", path);
  main.focus();
  return show();
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a");
  const plain = !event.defaultPrevented && event.button === 0 && !(event.metaKey || event.ctrlKey || event.shiftKey);
  if (!link || !plain || link.origin !== location.origin || link.hasAttribute("download")) return;
  if (link.pathname.startsWith("/api/") || link.pathname.startsWith("/static/") || link.hash) return;
  event.preventDefault();
  go(link.pathname + link.search);
});
addEventListener("popstate", show);
document.addEventListener("logged-out", () => { state.session = null; hush(); show(); });

function login() {
  document.title = "Log in – Unmask";
  const form = h("form", { class: "card", novalidate: true }, h("h1", {}, "Log in"),
    field({ name: "token", label: "Token (from unmask tokens add)", type: "password", autocomplete: "current-password" }),
    h("div", { class: "row" }, h("button", { class: "main" }, "Log in")));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      state.session = await ask("/api/session", "POST", { token: new FormData(form).get("token") });
      greet();
      listen();
      show();
    } catch (error) {
      form.querySelector("#error-token").textContent = error.message;
      form.querySelector("input").focus();
    }
  });
  main.replaceChildren(form);
  form.querySelector("input").focus();
}

function greet() {
  const { name, role, open } = state.session ?? {};
  document.getElementById("who").textContent = name ? `${name}, ${role}` : "";
  document.getElementById("logout").hidden = !name || open;
}

document.getElementById("logout").addEventListener("click", async () => {
  await ask("/api/session", "DELETE").catch(() => {});
  state.session = null;
  greet();
  hush();
  show();
});

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("theme", root.dataset.theme); } catch { /* private windows keep nothing */ }
});
try {
  const theme = localStorage.getItem("theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch { /* the same */ }

function hush() {
  events?.close();
  events = null;
}

function listen() {
  hush();
  heard = Date.now();
  events = new EventSource("/api/events");
  events.addEventListener("changes", (event) => take(JSON.parse(event.data)));
  events.addEventListener("beat", () => { heard = Date.now(); });
  events.onerror = () => {
    // A browser does not say why; a session that ended would be tried for ever.
    ask("/api/session").then((session) => { if (!session.name) document.dispatchEvent(new Event("logged-out")); }).catch(() => {});
  };
}

function take(changes) {
  heard = Date.now();
  if (changes.whole) state.feeds.clear();
  for (const id of changes.gone) state.feeds.delete(id);
  for (const card of changes.feeds) state.feeds.set(card.id, card);
  state.head = changes;
  const waiting = document.getElementById("waiting");
  waiting.textContent = changes.samples;
  waiting.hidden = !changes.samples;
  warn();
  page?.changed?.(changes);
}

function warn() {
  const head = state.head;
  if (!state.session?.name) return say("");
  if (Date.now() - heard > DEAF_MS) return say("Not connected: what is shown here may no longer hold.");
  if (head?.away) return say(`The log does not answer, so nothing here is new: ${head.away}`);
  if (head && !head.ready) return say("Still reading what was recorded.");
  return say("");
}
setInterval(warn, 2000);
setInterval(() => { if (events?.readyState === EventSource.CLOSED && state.session?.name) listen(); }, 5000);

state.session = await ask("/api/session").catch(() => null);
greet();
if (state.session?.name) listen();
show();
