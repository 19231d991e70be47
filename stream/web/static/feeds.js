// Attach, detach, change rates; what is wrong stands beside the field.

import { ask, clear, complain, dialog, field, h, head, may, mute, state, tag, when } from "./base.js";

export const title = "Feeds";

let table = null;

export async function enter(main) {
  table = h("tbody");
  main.append(h("h1", {}, "Feeds"), may("operator") ? form() : h("p", { class: "faint" }, "Attaching needs the role operator."),
    h("div", { class: "scroll", tabindex: "0" }, h("table", {}, h("caption", {}, "Attached feeds"),
      head("id", "stands", "address", "labels", "pictures/s while calm", ""), table)));
  await fill();
}

export function leave() { table = null; }

let key = "";
export function changed() {
  const now = [...state.feeds.values()].map((card) => `${card.id}${card.state}${card.muted_until_us}`).join();
  if (now === key || table?.contains(document.activeElement)) return;
  key = now;
  fill().catch(() => {});
}

function form() {
  const fields = [
    { name: "address", label: "Address (rtmp://, rtsp://, http(s)://, srt://, udp://, tcp://, env:UNMASK_SOURCE_…)", required: true, size: 60, autocomplete: "off", spellcheck: "false" },
    { name: "id", label: "Id (optional)", autocomplete: "off", spellcheck: "false", maxlength: 64 },
    { name: "fps", label: "Pictures/s while calm (optional)", type: "number", min: 0, max: 60, step: "any" },
    { name: "labels", label: "Labels (region=north, group=…)", autocomplete: "off" },
  ];
  const general = h("p", { class: "error", role: "alert" });
  const box = h("form", { class: "card", novalidate: true, "aria-label": "Attach a feed" }, h("h2", {}, "Attach"),
    h("div", { class: "row" }, ...fields.map(field)), general, h("button", { class: "main" }, "Attach"));
  box.addEventListener("submit", async (event) => {
    event.preventDefault();
    clear(box);
    general.textContent = "";
    const given = Object.fromEntries(new FormData(box));
    try {
      const done = await ask("/api/feeds", "POST", {
        address: given.address, id: given.id || null, fps: given.fps === "" ? null : Number(given.fps), labels: labels(given.labels),
      });
      box.reset();
      general.textContent = "";
      document.getElementById("main").focus();
      await later(done.id);
    } catch (error) {
      if (!complain(box, error)) general.textContent = error.message;
    }
  });
  return box;
}

// The list is read from the log, a second behind what was written to it.
async function later(id) {
  for (let look = 0; look < 6 && table; look++) {
    await new Promise((done) => setTimeout(done, 500));
    await fill();
    if (table?.querySelector(`[data-feed="${CSS.escape(id)}"]`)) return;
  }
}

function labels(text) {
  const found = {};
  for (const part of text.split(/[,\n]/).map((one) => one.trim()).filter(Boolean)) {
    const [name, ...value] = part.split("=");
    if (!value.length) throw Object.assign(new Error(`label "${part}" must look like region=north`), { field: "labels" });
    found[name.trim()] = value.join("=").trim();
  }
  return found;
}

async function fill() {
  const found = await ask("/api/feeds");
  table?.replaceChildren(...found.map(row));
}

function row(feed) {
  const shown = Object.entries(feed.labels).map(([name, value]) => `${name}=${value}`).join(", ");
  return h("tr", { "data-feed": feed.id }, h("th", { scope: "row" }, feed.id),
    h("td", {}, tag(feed.state), feed.why ? h("div", { class: "faint" }, feed.why) : null,
      feed.muted_until_us ? h("div", { class: "faint" }, `muted until ${when(feed.muted_until_us)} UTC by ${feed.muted_by}: ${feed.muted_why}`) : null),
    h("td", {}, h("code", {}, feed.source)), h("td", {}, shown), h("td", {}, rate(feed)),
    h("td", {}, h("div", { class: "row" },
      may("moderator") ? h("button", { type: "button", onclick: () => mute(feed.id, feed.muted_until_us) }, feed.muted_until_us ? "Unmute" : "Mute") : null,
      may("operator") ? h("button", { type: "button", class: "bad", onclick: () => detach(feed.id) }, "Detach") : null)));
}

function rate(feed) {
  if (!may("operator")) return feed.wanted_fps ?? "default";
  const name = `fps-${feed.id}`;
  const error = h("div", { class: "error", id: `error-${name}`, role: "alert" });
  const input = h("input", { type: "number", min: 0, max: 60, step: "any", size: 5, value: feed.wanted_fps, placeholder: "default",
    "aria-label": `Pictures a second of ${feed.id} while calm`, "aria-describedby": error.id });
  const save = async () => {
    error.textContent = "";
    try {
      await ask(`/api/feeds/${feed.id}`, "PATCH", { fps: input.value === "" ? null : Number(input.value) });
    } catch (refused) {
      error.textContent = refused.message;
    }
  };
  input.addEventListener("change", save);
  return h("div", {}, input, error);
}

async function detach(id) {
  const done = await dialog(`Detach ${id}? Nobody watches it then, and its open incident closes.`, [], () => ask(`/api/feeds/${id}`, "DELETE"), "Detach", true);
  if (done) setTimeout(() => table && fill(), 1300);
}
