// Who did what.

import { ask, h, head, when } from "./base.js";

export const title = "Audit";

export async function enter(main) {
  const found = await ask("/api/audit");
  main.append(h("h1", {}, "Audit"), h("div", { class: "scroll", tabindex: "0" }, h("table", {}, h("caption", {}, "The newest first"),
    head("UTC", "who", "role", "from", "did", "to", "detail"),
    h("tbody", {}, ...found.map((one) => h("tr", {}, h("td", {}, when(one.time_us)),
      ...["who", "role", "address", "action", "about", "detail"].map((name) => h("td", {}, one[name] ?? ""))))))));
}
