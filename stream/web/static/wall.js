// Every feed, the worst first. Only what can be seen is drawn, and only when it changes.

import { h, may, mute, number, share, state, svg, tag } from "./base.js";

export const title = "Wall";

const SORT_MS = 2500; // tiles that jump more often cannot be read
const tiles = new Map();
let list = null;
let summary = null;
let seen = null;
let search = "";
let only = "";
let sorted = 0;
let frame = 0;
let later = 0;

export function enter(main) {
  list = h("ul", { class: "wall", "aria-label": "Feeds, the worst first" });
  summary = h("p", { class: "faint" });
  const filter = h("div", { class: "row" },
    h("label", {}, "Find", h("input", { type: "search", value: search, oninput: (event) => { search = event.target.value.toLowerCase(); order(true); } })),
    h("label", {}, "Show", choice()));
  main.append(h("h1", {}, "Wall"), filter, summary, list);
  seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const tile = entry.target.tile;
      tile.visible = entry.isIntersecting;
      if (tile.visible) draw(tile);
    }
  }, { rootMargin: "200px" });
  update();
}

export function leave() {
  seen?.disconnect();
  tiles.clear();
  list = null;
}

export function changed() {
  if (!list || frame) return;
  frame = requestAnimationFrame(() => { frame = 0; if (list) update(); });
}

function choice() {
  const words = [["", "all"], ["trouble", "trouble"], ["incident", "open incidents"], ["live", "live"], ["muted", "muted"]];
  const select = h("select", { onchange: (event) => { only = event.target.value; order(true); } },
    ...words.map(([value, text]) => h("option", { value }, text)));
  select.value = only;
  return select;
}

function update() {
  for (const [id, tile] of tiles) if (!state.feeds.has(id)) { seen.unobserve(tile.root); tile.root.remove(); tiles.delete(id); }
  let fresh = false;
  for (const card of state.feeds.values()) {
    fresh ||= !tiles.has(card.id);
    const tile = tiles.get(card.id) ?? made(card.id);
    if (tile.card === card) continue;
    tile.card = card;
    if (tile.visible) draw(tile);
  }
  order(fresh);
}

function wanted(card) {
  const text = [card.id, card.state, card.verdict, ...card.reasons, ...Object.entries(card.labels).flat()].join(" ").toLowerCase();
  if (search && !text.includes(search)) return false;
  if (only === "trouble") return card.rank < 7;
  if (only === "incident") return Boolean(card.incident);
  if (only === "live") return card.state === "live";
  if (only === "muted") return Boolean(card.muted_until_us);
  return true;
}

function order(now) {
  const soon = SORT_MS - (Date.now() - sorted);
  if (!now && (soon > 0 || list.contains(document.activeElement))) { // not while a tile is being used
    later ||= setTimeout(() => { later = 0; if (list) order(false); }, Math.max(soon, 500));
    return;
  }
  sorted = Date.now();
  const cards = [...state.feeds.values()].filter(wanted);
  cards.sort((a, b) => a.rank - b.rank || (a.id < b.id ? -1 : 1));
  const shown = new Set(cards.map((card) => card.id));
  for (const [id, tile] of tiles) if (!shown.has(id)) tile.root.remove();
  let place = list.firstElementChild;
  for (const card of cards) {
    const root = tiles.get(card.id)?.root;
    if (!root) continue;
    if (root === place) place = place.nextElementSibling;
    else list.insertBefore(root, place);
  }
  const all = [...state.feeds.values()];
  const count = (state_) => all.filter((card) => card.state === state_).length;
  const open = all.filter((card) => card.incident).length;
  summary.textContent = all.length
    ? `${all.length} feeds: ${count("live")} live, ${count("degraded")} degraded, ` +
      `${count("silent") + count("reconnecting")} silent or reconnecting, ${count("unwatched")} unwatched; ` +
      `${open} with an open incident.` + (cards.length < all.length ? ` ${cards.length} shown.` : "") +
      (state.head?.left_out ? ` ${state.head.left_out} more feeds are listed than can be shown.` : "")
    : "No feed is attached. Feeds attaches one.";
}

function made(id) {
  const tile = { id, visible: false, card: null, picture: null };
  tile.img = h("img", { alt: `Newest picture of ${id}`, decoding: "async" });
  tile.img.hidden = true;
  tile.img.addEventListener("load", () => { tile.img.hidden = false; boxes(tile); });
  tile.boxes = svg("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" });
  tile.state = h("span");
  tile.verdict = h("p");
  tile.why = h("p", { class: "faint" });
  tile.facts = h("p", { class: "faint" });
  tile.line = svg("polyline", { points: "" });
  tile.spark = svg("svg", { class: "spark", viewBox: "0 -9 59 18", preserveAspectRatio: "none", role: "img" },
    svg("line", { x1: 0, x2: 59, y1: 0, y2: 0 }), tile.line);
  tile.actions = h("div", { class: "actions" });
  tile.root = h("li", { class: "tile", "data-feed": id }, h("div", { class: "shot" }, tile.img, tile.boxes),
    h("div", { class: "text" }, h("h2", {}, h("span", {}, id), tile.state), tile.verdict, tile.why, tile.facts, tile.spark), tile.actions);
  tile.root.tile = tile;
  tiles.set(id, tile);
  list.append(tile.root);
  seen.observe(tile.root);
  return tile;
}

function draw(tile) {
  const card = tile.card;
  if (!card) return;
  tile.root.className = `tile ${card.muted_until_us ? "" : card.incident ? "bad" : card.state === "live" || card.state === "ended" ? "" : "warn"}`;
  tile.state.replaceChildren(tag(card.state));
  const reasons = card.reasons.length ? ` ${card.reasons.join(", ")}` : "";
  const live = card.state === "live" || card.state === "degraded";
  tile.verdict.replaceChildren(...(card.verdict && live ? [tag(card.verdict), reasons, said(card)] : ["nothing said of it now"]));
  tile.why.textContent = [card.why, card.muted_until_us && `muted by ${card.muted_by}: ${card.muted_why}`].filter(Boolean).join("; ");
  tile.facts.textContent = live ? [
    card.lag_s === null ? card.kind : `${number(card.lag_s, 1)} s behind`, `${number(card.fps, 1)} pictures/s`, `${card.faces} faces`,
  ].join(" · ") : "";
  line(tile, card.spark);
  if (card.picture_us && card.picture_us !== tile.picture) {
    tile.picture = card.picture_us;
    tile.img.src = `/api/feeds/${encodeURIComponent(tile.id)}/picture?us=${card.picture_us}`;
  } else if (card.picture_us) boxes(tile);
  actions(tile, card);
}

const said = (card) => (card.probability === null ? "" : ` probability ${share(card.probability)}`);

function line(tile, spark) {
  // Scores are log odds; beyond 8 nothing more is to be seen.
  const points = spark.map((value, at) => (value === null ? null : `${at},${-Math.max(-8, Math.min(8, value))}`)).filter(Boolean);
  tile.line.setAttribute("points", points.join(" "));
  const last = spark.at(-1);
  tile.spark.setAttribute("aria-label", `highest score of the last two minutes${last === undefined || last === null ? "" : `, now ${last}`}`);
}

function boxes(tile) {
  tile.boxes.replaceChildren(...tile.card.boxes.map(({ box: [x0, y0, x1, y1], verdict, reasons }) =>
    svg("rect", { class: `box ${verdict}`, x: x0, y: y0, width: Math.max(0, x1 - x0), height: Math.max(0, y1 - y0) },
      svg("title", {}, [verdict, ...reasons].join(", ")))));
}

function actions(tile, card) {
  const key = `${card.incident}/${card.muted_until_us}`;
  if (tile.key === key) return;
  tile.key = key;
  tile.actions.replaceChildren(
    ...(card.incident ? [h("a", { class: "button", href: `/incident/${card.incident}` }, `Look at the incident (${card.severity})`)] : []),
    ...(may("moderator") ? [h("button", { type: "button", onclick: () => mute(card.id, card.muted_until_us) }, card.muted_until_us ? "Unmute" : "Mute")] : []));
}
