// The timeline of an incident: probability with interval and thresholds, logits per network, quality.

import { clock, h, svg } from "./base.js";

const WIDTH = 1000, LEFT = 46, RIGHT = 990;
const PROB = [22, 150], LOGIT = [182, 290], QUALITY = [318, 350], HEIGHT = 374;
const LIMIT = 10; // log odds; beyond, nothing more is to be seen
const HOLE_US = 3e6; // a line does not bridge what was not looked at

export function chart(found, times, seek) {
  const stamps = [...times.frames.map((one) => one.us), ...times.verdicts.map((one) => one.us), found.first_us, found.last_us];
  const first = Math.min(...stamps), last = Math.max(...stamps, first + 1e6);
  const x = (us) => LEFT + ((us - first) / (last - first)) * (RIGHT - LEFT);
  const y = ([top, bottom], value) => bottom - value * (bottom - top);
  const logit = (value) => y(LOGIT, (Math.max(-LIMIT, Math.min(LIMIT, value)) + LIMIT) / (2 * LIMIT));
  const rect = (name, from, to, [top, bottom]) => svg("rect", { class: name, x: x(from), width: Math.max(0, x(Math.min(to, last)) - x(from)), y: top, height: bottom - top });
  const now = svg("line", { class: "now", x1: -9, x2: -9, y1: PROB[0], y2: QUALITY[1] });
  const root = svg("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": spoken(found, times) },
    rect("found", found.first_us, found.last_us, [PROB[0], QUALITY[1]]),
    ...times.dropped.map((one) => rect("hole", Math.max(one.first_us, first), one.last_us, [PROB[0], QUALITY[1]])),
    ...[[PROB, 0], [PROB, 1], [LOGIT, 0.5], [QUALITY, 0], [QUALITY, 1]].map(([panel, at]) => svg("line", { class: "axis", x1: LEFT, x2: RIGHT, y1: y(panel, at), y2: y(panel, at) })),
    ...band(times.verdicts, last, x, (value) => y(PROB, value)),
    limit("limit", found.thresholds.open_probability), limit("limit low", found.thresholds.close_probability),
    svg("path", { class: "prob", d: steps(times.verdicts, last, x, (value) => y(PROB, value)) }),
    ...members(times).map((name, at) => svg("path", { class: `member m${at % 4}`, d: path(highest(times, (face) => face.logits[name]), x, logit) })),
    svg("path", { class: "fused", d: path(highest(times, (face) => face.fused), x, logit) }),
    svg("path", { class: "quality", d: path(highest(times, (face) => face.quality), x, (value) => y(QUALITY, value)) }),
    words(4, PROB[0] + 8, "1"), words(4, PROB[1], "0"), words(LEFT, PROB[0] - 7, "probability, with interval"),
    words(4, logit(0) + 4, "0"), words(LEFT, LOGIT[0] - 7, "logits of the highest face"), words(LEFT, QUALITY[0] - 7, "quality"),
    words(LEFT, HEIGHT - 4, `${clock(first)} UTC`), words(RIGHT - 60, HEIGHT - 4, clock(last)), now);
  root.addEventListener("click", (event) => {
    const bounds = root.getBoundingClientRect();
    const at = ((event.clientX - bounds.left) / bounds.width) * WIDTH;
    seek(first + ((at - LEFT) / (RIGHT - LEFT)) * (last - first));
  });

  function limit(name, value) {
    return svg("line", { class: name, x1: LEFT, x2: RIGHT, y1: y(PROB, value), y2: y(PROB, value) }, svg("title", {}, String(value)));
  }
  function words(left, top, text) { return svg("text", { x: left, y: top }, text); }

  const key = [["fused", "all networks"], ...members(times).map((name, at) => [`member m${at % 4}`, name])];
  const legend = h("p", { class: "faint" }, `Dashed: opens at ${found.thresholds.open_probability}, closes below ${found.thresholds.close_probability}` +
    `${found.thresholds.own_calibration ? " unless your own calibration says otherwise" : ""}. Shaded: the incident. Grey: not looked at. `,
    ...key.flatMap(([name, text]) => [svg("svg", { class: "chart", width: 34, height: 10, viewBox: "0 0 34 10", "aria-hidden": "true" }, svg("path", { class: name, d: "M0 5H34" })), ` ${text}  `]));
  for (const line of legend.querySelectorAll("svg")) line.setAttribute("class", "chart key");
  return { root: h("div", {}, root, legend), now: (us) => { now.setAttribute("x1", x(us)); now.setAttribute("x2", x(us)); } };
}

function members(times) {
  return [...new Set(times.frames.flatMap((one) => one.faces.flatMap((face) => Object.keys(face.logits))))].sort();
}

function highest(times, value) {
  return times.frames.map(({ us, faces }) => {
    const found = faces.map(value).filter((one) => one !== null && one !== undefined);
    return { us, value: found.length ? Math.max(...found) : null };
  });
}

function path(points, x, y) {
  let drawn = "", before = null;
  for (const { us, value } of points) {
    if (value === null) { before = null; continue; }
    drawn += `${before !== null && us - before < HOLE_US ? "L" : "M"}${x(us).toFixed(1)} ${y(value).toFixed(1)}`;
    before = us;
  }
  return drawn;
}

function steps(verdicts, last, x, y) {
  let drawn = "", open = false;
  verdicts.forEach(({ us, probability }, at) => {
    const until = verdicts[at + 1]?.us ?? last;
    if (probability === null) { open = false; return; }
    drawn += `${open ? "L" : "M"}${x(us).toFixed(1)} ${y(probability).toFixed(1)}H${x(until).toFixed(1)}`;
    open = true;
  });
  return drawn;
}

function band(verdicts, last, x, y) {
  return verdicts.map(({ us, interval }, at) => {
    if (!interval) return null;
    const until = verdicts[at + 1]?.us ?? last;
    return svg("rect", { class: "band", x: x(us), width: Math.max(0, x(until) - x(us)), y: y(interval[1]), height: Math.max(1, y(interval[0]) - y(interval[1])) });
  });
}

function spoken(found, times) {
  return `Timeline of ${times.frames.length} pictures from ${clock(found.first_us)} to ${clock(found.last_us)} UTC; the numbers stand below it`;
}
