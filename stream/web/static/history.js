// Incidents by time, feed, severity, verdict, decision; search, export; how right they were.

import { ask, field, h, head, number, share, span, tag, when } from "./base.js";

export const title = "History";

const all = (words) => [["", "any"], ...words.map((word) => [word, word])];

export async function enter(main) {
  const body = h("tbody"), note = h("p", { class: "faint", role: "status" }), error = h("p", { class: "error", role: "alert" });
  const more = h("button", { type: "button", hidden: true }, "Older ones");
  const links = h("span", { class: "row" });
  const box = h("form", { class: "row", role: "search" },
    field({ name: "q", label: "Words", type: "search" }), field({ name: "feed", label: "Feed", type: "search" }),
    field({ name: "from", label: "From (UTC)", type: "datetime-local" }), field({ name: "to", label: "To", type: "datetime-local" }),
    field({ name: "severity", label: "Severity", kind: "select", options: all(["high", "medium", "low"]) }),
    field({ name: "status", label: "Status", kind: "select", options: all(["open", "closed", "retracted"]) }),
    field({ name: "verdict", label: "Verdict", kind: "select", options: all(["manipulated", "inconclusive"]) }),
    field({ name: "decision", label: "Decision", kind: "select", options: all(["none", "confirmed", "dismissed", "inconclusive"]) }),
    h("button", { class: "main" }, "Search"));
  let last = "";
  const query = () => {
    const found = new URLSearchParams();
    for (const [name, value] of new FormData(box)) {
      if (!value) continue;
      if (name === "from" || name === "to") found.set(`${name}_us`, String(Date.parse(`${value}Z`) * 1000));
      else found.set(name, value);
    }
    return found;
  };
  const show = async (older) => {
    const asked = query();
    links.replaceChildren(...["csv", "json"].map((kind) => h("a", { class: "button", href: `/api/incidents.${kind}?${asked}`, download: `incidents.${kind}` }, `Export ${kind.toUpperCase()}`)));
    if (older) asked.set("before", last);
    error.textContent = "";
    try {
      const found = await ask(`/api/incidents?${asked}`);
      const rows = found.incidents.map(row);
      if (older) body.append(...rows); else body.replaceChildren(...rows);
      last = found.incidents.at(-1)?.id ?? last;
      note.textContent = `${found.total} incidents, ${body.children.length} shown.`;
      more.hidden = body.children.length >= found.total;
    } catch (refused) {
      error.textContent = refused.message;
    }
  };
  box.addEventListener("submit", (event) => { event.preventDefault(); show(false); });
  more.addEventListener("click", () => show(true));
  const right = h("section", { class: "card", "aria-label": "How right alerts were" });
  main.append(h("h1", {}, "History"), box, links, error, note, h("div", { class: "scroll", tabindex: "0" }, h("table", {},
    head("begin (UTC)", "feed", "", "#probability", "#length", "decision", "reason"), body)), more, right);
  await show(false);
  precision(right, await ask("/api/precision"));
}

function row(one) {
  return h("tr", {}, h("td", {}, h("a", { href: `/incident/${one.id}` }, when(one.first_us))), h("td", {}, one.stream),
    h("td", {}, tag(one.severity), " ", tag(one.status)), h("td", { class: "num" }, share(one.probability)), h("td", { class: "num" }, span(one.duration_s)),
    h("td", {}, one.decision ? tag(one.decision) : h("span", { class: "faint" }, "none")), h("td", {}, one.decision_reason || one.reason || ""));
}

function precision(box, found) {
  const rows = [["all", found.all], ...Object.entries(found.models), ...Object.entries(found.feeds)];
  const missed = found.missed;
  box.append(h("h2", {}, "How right alerts were"), h("div", { class: "scroll", tabindex: "0" }, h("table", {},
    h("caption", {}, "Of the incidents that somebody decided; inconclusive ones are left out. Networks answer for those for which they spoke."),
    head("", "#right", "#95 % interval", "#confirmed", "#dismissed", "#inconclusive"),
    h("tbody", {}, ...rows.map(([name, tally]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", { class: "num" }, share(tally.precision)),
      h("td", { class: "num" }, tally.interval ? tally.interval.map(share).join(" – ") : "–"),
      ...["confirmed", "dismissed", "inconclusive"].map((kind) => h("td", { class: "num" }, tally[kind]))))))),
  h("p", {}, missed.reviewed ? `Of faces without an alert ${missed.reviewed} were reviewed, standing for about ${number(missed.faces, 0)}: ${missed.found} were manipulated, an estimated ${share(missed.share)} of all such faces.`
    : "No face without an alert has been reviewed yet: nothing is known of what was missed."));
}
