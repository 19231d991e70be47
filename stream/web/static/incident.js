// One incident: what was said, on what grounds, and what somebody makes of it.

import { ask, clock, dialog, h, head, may, number, say, share, span, tag, when } from "./base.js";
import { chart } from "./chart.js";

export const title = "Incident";

const LOOK_MS = 4000;
let timer = 0;
let current = null;
let seek = null;

const evidence = (ref) => `/api/evidence/${ref.replace("evidence://", "")}`;

export async function enter(main, [name]) {
  const view = { name, main, number: -1, decided: "", clip: null };
  current = view;
  await refresh(view);
  timer = setInterval(() => refresh(view).catch((error) => say(error.message)), LOOK_MS);
}

export function leave() {
  clearInterval(timer);
  current = null;
  seek = null;
}

async function refresh(view) {
  const found = await ask(`/api/incidents/${view.name}`);
  if (current !== view) return;
  const key = `${found.events.length}/${found.decisions.length}/${found.status}/${found.muted}`;
  if (key === view.key) return;
  view.key = key;
  const video = view.main.querySelector("video");
  const at = video && !video.paused ? video.currentTime : null;
  const times = await ask(`/api/incidents/${view.name}/timeline`).catch((error) => ({ error: error.message }));
  if (current !== view) return;
  draw(view, found, times, at);
}

function draw(view, found, times, at) {
  const data = found.newest;
  const clip = data?.evidence.filter((item) => item.kind === "clip").at(-1);
  const player = clip ? video(clip, found, times, at) : h("p", { class: "faint" }, found.status === "open"
    ? "The clip comes some seconds after the incident opened." : "There is no clip of this incident.");
  view.main.replaceChildren(
    h("h1", {}, `Incident on ${found.stream}`),
    h("p", {}, tag(found.status), " ", tag(found.severity), " ", tag(found.verdict), found.replay ? " replay of dead letters " : " ",
      `${when(found.first_us)} to ${clock(found.last_us)} UTC, ${span(found.duration_s)}`,
      found.muted ? ", feed muted" : "", found.reason ? `; ${found.status}: ${found.reason}` : ""),
    h("section", { class: "card", "aria-label": "Decide" }, verdict(found), buttons(found)),
    h("div", { class: "two" },
      h("section", { class: "card" }, h("h2", {}, "Clip"), player),
      h("section", { class: "card" }, h("h2", {}, "Faces"), crops(data))),
    h("section", { class: "card" }, h("h2", {}, "Timeline"), lines(found, times)),
    h("div", { class: "two" },
      h("section", { class: "card" }, h("h2", {}, "Why"), why(data)),
      h("section", { class: "card" }, h("h2", {}, "By what"), models(data))),
    h("section", { class: "card" }, h("h2", {}, "What was told"), events(found)));
}

function verdict(found) {
  const interval = found.interval ? ` (${share(found.interval[0])} to ${share(found.interval[1])})` : "";
  const right = found.newest?.expected_precision;
  return h("p", {}, `Probability ${share(found.probability)}${interval}. `,
    right === undefined || right === null ? "" : `Of such alerts about ${share(right)} are right if ${share(found.newest.prevalence)} of your feeds are manipulated. `,
    `Suggested: ${found.suggested_action}.`);
}

function buttons(found) {
  const past = found.decisions.map((one) => h("li", {}, tag(one.decision), ` by ${one.author}, ${when(one.time_us)}`, one.reason ? `: ${one.reason}` : ""));
  const decide = (choice, heading, verb, dangerous) => () => dialog(heading, [
    { name: "reason", label: choice === "dismissed" ? "Why (everybody who got the alert is told)" : "Note (optional)", kind: "textarea" },
  ], (given) => ask(`/api/incidents/${found.id}/decision`, "POST", { decision: choice, reason: given.reason }), verb, dangerous)
    .then((done) => { if (done && current) { current.key = ""; setTimeout(() => current && refresh(current), 1200); } });
  return h("div", {},
    past.length ? h("ul", {}, ...past) : h("p", { class: "faint" }, "Nobody has decided yet."),
    h("div", { class: "row" },
      ...(may("moderator") ? [
        h("button", { type: "button", class: "main", onclick: decide("confirmed", "Confirm: this is manipulated", "Confirm") }, "Confirm"),
        h("button", { type: "button", class: "bad", onclick: decide("dismissed", "Dismiss: this is not manipulated", "Dismiss", true) }, "Dismiss"),
        h("button", { type: "button", onclick: decide("inconclusive", "Mark as inconclusive: it cannot be told", "Mark") }, "Inconclusive"),
      ] : [h("span", { class: "faint" }, "Deciding needs the role moderator.")]),
      h("a", { class: "button", href: `/api/incidents/${found.id}/bundle`, download: true }, "Download the evidence")));
}

// The clip is cut once; what comes later may be stronger still, and lies behind its end.
function strongest(begins, seconds, found, times) {
  if (begins === null) return 0;
  const inside = (us) => us >= begins && us <= begins + seconds * 1e6;
  if (inside(found.peak_us)) return (found.peak_us - begins) / 1e6;
  let best = { us: begins, value: -Infinity };
  for (const { us, faces } of times.frames ?? []) {
    const value = Math.max(...faces.map((face) => face.fused ?? -Infinity));
    if (inside(us) && value >= best.value) best = { us, value };
  }
  return (best.us - begins) / 1e6;
}

function video(clip, found, times, at) {
  const begins = clip.media_us;
  let peak = 0;
  const player = h("video", { controls: true, preload: "metadata", muted: true, playsinline: true, src: evidence(clip.ref) });
  const note = h("p", { class: "faint" });
  player.addEventListener("loadedmetadata", () => {
    peak = strongest(begins, player.duration, found, times);
    if (begins !== null) note.textContent = `The strongest moment in it is at ${number(peak, 1)} s.`;
    player.currentTime = at ?? Math.max(0, peak - 1);
  }, { once: true });
  player.addEventListener("error", () => { note.textContent = "This browser cannot play the clip; download the evidence to see it."; });
  player.addEventListener("timeupdate", () => { if (begins !== null) seek?.now(begins + player.currentTime * 1e6); });
  const jump = h("button", { type: "button", onclick: () => { player.currentTime = Math.max(0, peak - 1); player.play().catch(() => {}); } }, "Play the strongest moment");
  player.to = (us) => { if (begins !== null) player.currentTime = Math.max(0, (us - begins) / 1e6); };
  return h("div", {}, player, note, jump);
}

function crops(data) {
  const items = data?.evidence ?? [];
  const pictures = items.filter((item) => item.kind === "crop");
  if (!pictures.length) return h("p", { class: "faint" }, "No crop was kept.");
  return h("div", { class: "crops" }, ...pictures.map((crop) => {
    const overlay = items.find((item) => item.kind === "overlay" && item.media_us === crop.media_us && item.track === crop.track);
    const picture = h("img", { src: evidence(crop.ref), alt: `Face of track ${crop.track} at ${clock(crop.media_us)}`, loading: "lazy" });
    const toggle = h("button", { type: "button", "aria-pressed": "false" }, "Where the networks looked");
    toggle.addEventListener("click", () => {
      const on = toggle.getAttribute("aria-pressed") !== "true";
      toggle.setAttribute("aria-pressed", String(on));
      picture.src = evidence(on ? overlay.ref : crop.ref);
    });
    return h("figure", {}, picture, h("figcaption", {}, `${clock(crop.media_us)} UTC, track ${crop.track?.split("/").at(-1)}`), overlay ? toggle : null);
  }));
}

function lines(found, times) {
  if (times.error) return h("p", { class: "error" }, times.error);
  if (!times.frames.length && !times.verdicts.length) return h("p", { class: "faint" }, "The scores of this time are not kept any more.");
  const drawn = chart(found, times, (us) => document.querySelector("video")?.to(us));
  seek = drawn;
  const rows = times.verdicts.map((one) => h("tr", {}, h("td", {}, clock(one.us)), h("td", {}, tag(one.verdict)), h("td", {}, one.reasons.join(", ")),
    h("td", { class: "num" }, share(one.probability)), h("td", { class: "num" }, one.interval ? one.interval.map(share).join(" – ") : "–"),
    h("td", { class: "num" }, one.sampled), h("td", { class: "num" }, one.dropped)));
  return h("div", {}, drawn.root, times.whole ? null : h("p", { class: "faint" }, "Not all scores are shown; the bundle has more."),
    h("details", {}, h("summary", {}, "As numbers"), h("div", { class: "scroll", tabindex: "0" }, h("table", {},
      head("UTC", "said", "reasons", "#probability", "#interval", "#pictures", "#dropped"),
      h("tbody", {}, ...rows)))));
}

const fact = (name, ...value) => [h("dt", {}, name), h("dd", {}, ...value)];

function why(data) {
  if (!data) return h("p", { class: "faint" }, "The events are not kept any more.");
  const odds = data.disagreement?.log_odds ?? {};
  const names = Object.keys({ ...data.members, ...odds });
  const cues = Object.entries(data.cues ?? {}).map(([name, cue]) => h("li", {}, `${name}: ${JSON.stringify(cue)}`));
  return h("div", {}, h("dl", { class: "facts" },
    ...fact("Likelihood ratio", data.llr === null ? "–" : `e^${number(data.llr)}`),
    ...fact("Set", data.conformal_set ?? "no sets in this calibration"),
    ...fact("Reasons", data.reasons.join(", ") || "none against deciding"),
    ...fact("Pictures", `${data.samples} read, worth ${number(data.effective_samples, 1)} independent ones`),
    ...fact("Faces", `${data.tracks_total}`),
    ...fact("Contradiction", data.disagreement ? `${number(data.disagreement.contradiction)} of at most ${number(data.disagreement.limit)}` : "one network"),
    ...fact("Tested for", data.tested_for.join(", ")),
    ...fact("Not tested for", data.not_tested_for.join(", "))),
  h("table", {}, h("caption", {}, "What each network said, on average: above 0 is manipulated"),
    head("network", "#logit", "#log odds on one scale"),
    h("tbody", {}, ...names.map((name) => h("tr", {}, h("td", {}, name), h("td", { class: "num" }, number(data.members[name])), h("td", { class: "num" }, number(odds[name])))))),
  cues.length ? h("ul", {}, ...cues) : null);
}

function models(data) {
  if (!data) return h("p", { class: "faint" }, "The events are not kept any more.");
  const alarms = data.false_alarms;
  return h("dl", { class: "facts" },
    ...data.models.flatMap((model) => fact(`${model.name} ${model.version}`, h("code", {}, model.sha256))),
    ...fact("Engine", `${data.engine}, ${data.precision}`),
    ...fact("Calibration", data.calibration, " ", h("code", {}, data.calibration_version)),
    ...fact("False alarms", alarms ? `at most ${number(alarms.per_hour, 3)} an hour of a feed (95 %), from ${number(alarms.hours, 1)} h of ${alarms.people} people` : "nothing is claimed"));
}

function events(found) {
  return h("div", { class: "scroll", tabindex: "0" }, h("table", {},
    head("event", "UTC", "severity", "#probability", "why"),
    h("tbody", {}, ...found.events.map((event) => h("tr", {}, h("td", {}, `${event.number} ${event.event}`), h("td", {}, when(event.last_media_us)),
      h("td", {}, event.severity), h("td", { class: "num" }, share(event.probability)), h("td", {}, event.reason ?? (event.changes ?? []).join(", ")))))));
}
