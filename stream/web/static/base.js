// What every page uses: elements made one by one and never out of text, requests, words for figures.

export const state = { session: null, feeds: new Map(), head: null };

const SVG = "http://www.w3.org/2000/svg";

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const h = (tag, attributes, ...children) => filled(document.createElement(tag), attributes, children);
export const svg = (tag, attributes, ...children) => filled(document.createElementNS(SVG, tag), attributes, children);

export class Refused extends Error {
  constructor(status, body) {
    super(body.error ?? `the server says ${status}`);
    this.status = status;
    this.field = body.field ?? null;
  }
}

export async function ask(path, method = "GET", body = undefined) {
  const headers = {};
  if (method !== "GET") headers["x-csrf-token"] = state.session?.csrf ?? "";
  if (body !== undefined) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Refused(0, { error: "the server does not answer" });
  }
  const found = await answer.json().catch(() => ({}));
  if (answer.ok) return found;
  if (answer.status === 401 && path !== "/api/session") document.dispatchEvent(new Event("logged-out"));
  throw new Refused(answer.status, found);
}

const ROLES = ["viewer", "moderator", "operator"];
export const may = (role) => ROLES.indexOf(state.session?.role) >= ROLES.indexOf(role);

export const when = (us) => (us ? new Date(us / 1000).toISOString().replace("T", " ").slice(0, 19) : "–");
export const clock = (us) => (us ? new Date(us / 1000).toISOString().slice(11, 19) : "–");
export const share = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`);
export const number = (value, digits = 2) => (value === null || value === undefined ? "–" : Number(value).toFixed(digits));

export function span(seconds) {
  if (seconds < 90) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 5400) return `${(seconds / 60).toFixed(1)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

const TONES = {
  manipulated: "bad", high: "bad", medium: "bad", open: "bad", unwatched: "bad", confirmed: "bad",
  inconclusive: "warn", low: "warn", silent: "warn", reconnecting: "warn", degraded: "warn", dismissed: "good",
  authentic: "good", live: "good",
};
export const tag = (word) => h("span", { class: `tag ${TONES[word] ?? ""}` }, word);
export const tone = (word) => TONES[word] ?? "";

// The head of a table; names that begin with # stand over numbers.
export const head = (...names) => h("thead", {}, h("tr", {}, ...names.map((name) =>
  h("th", { scope: "col", class: name.startsWith("#") ? "num" : null }, name.replace("#", "")))));

export function say(text) {
  const banner = document.getElementById("banner");
  if (banner.textContent !== text) banner.textContent = text;
  banner.hidden = !text;
}

// Ask for something in words; the answer is what `send` did, errors stay beside the field that they are about.
export function dialog(title, fields, send, verb = "Send", dangerous = false) {
  const box = document.getElementById("dialog");
  return new Promise((resolve) => {
    const form = h("form", { novalidate: true }, h("h2", { id: "dialog-title" }, title), ...fields.map(field));
    const general = h("p", { class: "error", role: "alert" });
    const close = (value) => { box.close(); resolve(value); };
    form.append(general, h("div", { class: "row" },
      h("button", { type: "submit", class: dangerous ? "bad" : "main" }, verb),
      h("button", { type: "button", onclick: () => close(null) }, "Cancel")));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      general.textContent = "";
      clear(form);
      try {
        close(await send(Object.fromEntries(new FormData(form))));
      } catch (error) {
        if (!complain(form, error)) general.textContent = error.message;
      }
    });
    box.oncancel = () => resolve(null);
    box.replaceChildren(form);
    box.showModal();
  });
}

export function field({ name, label, kind = "input", options = [], ...rest }) {
  const error = h("span", { class: "error", id: `error-${name}`, role: "alert" });
  const choices = options.map(([value, text]) => h("option", { value }, text));
  return h("label", {}, label, h(kind, { name, "aria-describedby": `error-${name}`, ...rest }, ...choices), error);
}

export function clear(form) {
  for (const error of form.querySelectorAll("label .error")) error.textContent = "";
  for (const input of form.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
}

export function complain(form, error) {
  const input = error.field && form.querySelector(`[name="${CSS.escape(error.field)}"]`);
  if (!input) return false;
  input.setAttribute("aria-invalid", "true");
  form.querySelector(`#error-${CSS.escape(error.field)}`).textContent = error.message;
  input.focus();
  return true;
}

export function mute(stream, until) {
  if (until) return ask(`/api/feeds/${stream}/mute`, "DELETE").catch((error) => say(error.message));
  const hours = [[1, "1 hour"], [4, "4 hours"], [12, "12 hours"], [24, "a day"], [168, "a week"]];
  return dialog(`Mute ${stream}`, [
    { name: "hours", label: "For", kind: "select", options: hours },
    { name: "reason", label: "Why (others read it)", kind: "textarea", required: true },
  ], (given) => ask(`/api/feeds/${stream}/mute`, "POST", { seconds: 3600 * Number(given.hours), reason: given.reason }), "Mute");
}
