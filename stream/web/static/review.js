// Faces that raised no alert, drawn at random: the only way to learn what is missed.

import { ask, h, may, number, share, when } from "./base.js";

export const title = "Review";

export async function enter(main) {
  const found = await ask("/api/samples");
  const list = h("ul", { class: "wall", "aria-label": "Faces to review" });
  const note = h("p", { class: "faint", role: "status" }, found.total
    ? `${found.total} faces wait. Of all faces that raised no alert ${share(found.rate)} are drawn.`
    : `Nothing waits. Of all faces that raise no alert ${share(found.rate)} are drawn.`);
  main.append(h("h1", {}, "Review"), note, list);
  list.append(...found.samples.map((one) => card(one, note)));
}

function card(one, note) {
  const error = h("p", { class: "error", role: "alert" });
  const root = h("li", { class: "tile" });
  const decide = (decision) => async () => {
    try {
      await ask(`/api/samples/${one.id}/decision`, "POST", { decision });
      const next = root.nextElementSibling ?? root.previousElementSibling;
      root.remove();
      next?.querySelector("button")?.focus();
      note.textContent = "Noted.";
    } catch (refused) {
      error.textContent = refused.message;
    }
  };
  root.append(h("div", { class: "text" }, h("img", { src: `/api/samples/${one.id}/picture`, alt: `Face on ${one.stream}`, loading: "lazy" }),
    h("p", {}, `${one.stream}, ${when(one.media_us)} UTC`), h("p", { class: "faint" }, `score ${number(one.fused)} (above 0: manipulated)`), error),
  h("div", { class: "actions" }, ...(may("moderator") ? [
    h("button", { type: "button", class: "bad", onclick: decide("confirmed") }, "Manipulated"),
    h("button", { type: "button", onclick: decide("dismissed") }, "Not manipulated"),
    h("button", { type: "button", onclick: decide("inconclusive") }, "Cannot tell"),
  ] : [])));
  return root;
}
