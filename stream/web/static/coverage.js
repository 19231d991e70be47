// What was watched, what could not be decided, what nobody watched: per feed and day.

import { ask, field, h, head, share, span, svg } from "./base.js";

export const title = "Coverage";

export async function enter(main) {
  const body = h("tbody"), note = h("p", { class: "faint", role: "status" }), error = h("p", { class: "error", role: "alert" });
  const box = h("form", { class: "row" }, field({ name: "from", label: "From (UTC)", type: "date" }), field({ name: "to", label: "To", type: "date" }),
    field({ name: "feed", label: "Feed", type: "search" }), h("button", { class: "main" }, "Show"));
  const show = async () => {
    const given = new FormData(box);
    const query = new URLSearchParams([...["from", "to"].filter((name) => given.get(name)).map((name) => [name, given.get(name)])]);
    error.textContent = "";
    try {
      const found = await ask(`/api/coverage?${query}`);
      const rows = found.rows.filter((row) => row.stream.includes(given.get("feed") ?? ""));
      note.textContent = found.share < 1 ? `Still adding up: ${share(found.share)} of what is recorded.` : `${rows.length} days of feeds. Bars: full height is decided, half height watched and inconclusive, the rest not watched.`;
      body.replaceChildren(...rows.map(row));
    } catch (refused) {
      error.textContent = refused.message;
    }
  };
  box.addEventListener("submit", (event) => { event.preventDefault(); show(); });
  main.append(h("h1", {}, "Coverage"), box, error, note, h("div", { class: "scroll", tabindex: "0" }, h("table", {},
    head("day", "feed", "#watched", "", "decided", "inconclusive", "not watched"), body)));
  await show();
}

const sum = (amounts) => Object.values(amounts).reduce((whole, part) => whole + part, 0);
const listed = (amounts) => Object.entries(amounts).map(([name, seconds]) => `${name} ${span(seconds)}`).join(", ") || "–";

function row(one) {
  const total = one.total_s || 1;
  const decided = sum(one.decided_s) / total, open = sum(one.inconclusive_s) / total;
  const bar = svg("svg", { class: "bar", viewBox: "0 0 1 1", preserveAspectRatio: "none", role: "img", "aria-label": `${share(decided)} decided, ${share(open)} inconclusive, the rest not watched` },
    svg("rect", { class: "none", x: 0, y: 0, width: 1, height: 1 }), svg("rect", { class: "good", x: 0, y: 0, width: decided, height: 1 }),
    svg("rect", { class: "warn", x: decided, y: 0.2, width: open, height: 0.6 }));
  return h("tr", {}, h("td", {}, one.day), h("th", { scope: "row" }, one.stream), h("td", { class: "num" }, share(one.watched_s / total)), h("td", {}, bar),
    h("td", {}, listed(one.decided_s)), h("td", {}, listed(one.inconclusive_s)), h("td", {}, listed(one.unwatched_s)));
}
