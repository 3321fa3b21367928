"use strict";

// A button shows and hides its text; a hidden text is inert, and screen readers skip it.
function lift(button, shown) {
  const text = document.getElementById(button.getAttribute("aria-controls"));
  button.setAttribute("aria-expanded", String(shown));
  button.querySelector("span").textContent = shown ? "hide" : "show";
  text.inert = !shown;
  shown ? text.removeAttribute("aria-hidden") : text.setAttribute("aria-hidden", "true");
}

const isShown = (button) => button.getAttribute("aria-expanded") === "true";

for (const button of document.querySelectorAll(".lift")) {
  button.addEventListener("click", () => lift(button, !isShown(button)));
}

for (const button of document.querySelectorAll(".lift-prompts")) {
  button.addEventListener("click", () => {
    for (const one of document.querySelectorAll(".prompt .lift")) lift(one, !isShown(button));
    button.setAttribute("aria-expanded", String(!isShown(button)));
    button.querySelector("span").textContent = isShown(button) ? "Hide" : "Show";
  });
}

// A table of several rows is sorted by its headings: up, down, and as it was. What is missing stays at the end.
function sortable(table) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const headings = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  headings.forEach((heading, at) => {
    const value = (row) => at ? row.cells[at].dataset.value ?? null : row.cells[0].textContent;
    if (at && rows.every((row) => value(row) === null)) return;
    const compare = (a, b) => at ? a - b : a.localeCompare(b, undefined, {numeric: true});
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const next = {ascending: "descending", descending: null}[heading.getAttribute("aria-sort")];
      for (const one of headings) one.removeAttribute("aria-sort");
      const known = rows.filter((row) => value(row) !== null);
      if (next === null) return body.append(...rows);
      heading.setAttribute("aria-sort", next ?? "ascending");
      known.sort((a, b) => compare(value(a), value(b)) * (next ? -1 : 1));
      body.append(...known, ...rows.filter((row) => !known.includes(row)));
    });
  });
}

// Each column of figures has a box that hides it; a group's heading spans what is left of it.
function hideable(table) {
  const chosen = document.createElement("details");
  chosen.className = "columns";
  chosen.append(Object.assign(document.createElement("summary"), {textContent: "Choose columns"}));
  const boxes = chosen.appendChild(document.createElement("div"));
  const groups = [...table.tHead.rows[0].cells].slice(1);
  const headings = [...table.tHead.rows[1].cells].slice(1);
  const groupOf = groups.flatMap((group) => Array(group.colSpan).fill(group));
  headings.forEach((heading, at) => {
    const box = Object.assign(document.createElement("input"), {type: "checkbox", checked: true});
    const label = boxes.appendChild(document.createElement("label"));
    label.append(box, ` ${[groupOf[at].textContent, heading.textContent].filter(Boolean).join(": ")}`);
    box.addEventListener("change", () => {
      for (const row of [table.tHead.rows[1], ...table.tBodies[0].rows]) row.cells[at + 1].hidden = !box.checked;
      const left = headings.filter((one, place) => groupOf[place] === groupOf[at] && !one.hidden).length;
      groupOf[at].hidden = !left;
      groupOf[at].colSpan = Math.max(1, left);
    });
  });
  table.closest(".scroll").before(chosen);
}

for (const table of document.querySelectorAll("table.grid")) {
  if (table.tHead.rows[1].cells.length > 3) hideable(table);
  if (table.tBodies[0].rows.length > 2) sortable(table);
}

// The samples on which methods disagree, or all of them.
const only = document.getElementById("only");
if (only) {
  only.hidden = false;
  only.addEventListener("change", (event) => {
    for (const one of document.querySelectorAll(".sample.agreed")) one.hidden = event.target.checked;
    for (const one of document.querySelectorAll(".more")) one.open ||= event.target.checked;
  });
}

// One token is selected. Tab enters and leaves the text, arrow keys move within it.
const tokens = [...document.querySelectorAll(".token")];

function choose(chosen) {
  for (const token of tokens) {
    token.setAttribute("aria-pressed", String(token === chosen));
    token.tabIndex = token === chosen ? 0 : -1;
  }
  const [figures, tables] = document.getElementById(chosen.dataset.place).content.cloneNode(true).children;
  document.getElementById("place-figures").replaceChildren(figures);
  document.getElementById("place-tables").replaceChildren(...tables.children);
}

// The nearest token on the line above (-1) or below (+1).
function across(token, direction) {
  const middle = (one) => one.offsetLeft + one.offsetWidth / 2;
  const beyond = tokens.filter((one) => (one.offsetTop - token.offsetTop) * direction > token.offsetHeight / 2);
  const line = beyond.at(direction > 0 ? 0 : -1)?.offsetTop;
  const far = (one) => Math.abs(middle(one) - middle(token));
  return beyond.filter((one) => one.offsetTop === line).sort((one, other) => far(one) - far(other))[0];
}

const MOVES = {
  ArrowRight: (at) => tokens[at + 1],
  ArrowLeft: (at) => tokens[at - 1],
  ArrowDown: (at) => across(tokens[at], 1),
  ArrowUp: (at) => across(tokens[at], -1),
  Home: () => tokens[0],
  End: () => tokens.at(-1),
};

tokens.forEach((token, at) => {
  token.addEventListener("focus", () => choose(token));
  token.addEventListener("click", () => choose(token)); // Safari does not focus a button that is clicked
  token.addEventListener("keydown", (event) => {
    const move = MOVES[event.key];
    if (!move) return;
    event.preventDefault();
    move(at)?.focus();
  });
});

for (const token of tokens.filter((one) => one.getAttribute("aria-pressed") === "true")) choose(token);

// Print has no buttons: elements with data-print open for it and close again.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details[data-print]:not([open])")];
  for (const one of opened) one.open = true;
});
addEventListener("afterprint", () => {
  for (const one of opened) one.open = false;
});
