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
