"use strict";
// Gradio replaces its elements, so all listeners are the document's. Text of models only ever becomes textContent.
(() => {
  const number = (value) => value === null ? "–" : value > 0 && value < 0.0005 ? "< 0.001" : value.toFixed(3);
  const PARTS = [["drawn", "drawn"], ["gains", "raised by q"], ["losses", "lowered by q"]];

  const make = (tag, text, parent) => {
    const one = document.createElement(tag);
    one.textContent = text;
    parent.append(one);
    return one;
  };

  // One card for all tokens: p, R and q of the token drawn, and of those that gain and lose most.
  const card = () => {
    const found = document.getElementById("bridle-card");
    if (found) return found;
    const made = make("div", "", document.querySelector("main") ?? document.body);
    Object.assign(made, {id: "bridle-card", className: "bridle", hidden: true});
    made.setAttribute("role", "tooltip");
    return made;
  };

  const row = (table, tag, cells) => {
    const line = make("tr", "", table);
    for (const cell of cells) make(tag, cell, line);
  };

  function show(token) {
    const chances = JSON.parse(token.dataset.chances);
    const [shown, table] = [card(), document.createElement("table")];
    row(table, "th", ["token", "p", "R", "q"]);
    for (const [part, title] of PARTS) {
      if (part !== "drawn" && chances[part].length) make("th", title, make("tr", "", table)).colSpan = 4;
      for (const [text, ...numbers] of chances[part]) row(table, "td", [text, ...numbers.map(number)]);
    }
    shown.replaceChildren(table);
    shown.hidden = false;
    token.setAttribute("aria-describedby", shown.id);
    const [at, size] = [token.getBoundingClientRect(), shown.getBoundingClientRect()];
    const below = at.bottom + 6 + size.height < innerHeight;
    shown.style.top = `${Math.max(4, below ? at.bottom + 6 : at.top - 6 - size.height)}px`;
    shown.style.left = `${Math.max(4, Math.min(at.left, innerWidth - size.width - 8))}px`;
  }

  const hide = () => { card().hidden = true; };

  document.addEventListener("pointerover", (event) => {
    const token = event.target.closest?.(".bridle .token");
    if (token) show(token);
    else if (!document.activeElement?.matches(".bridle .token")) hide();
  });
  document.addEventListener("focusin", (event) => event.target.matches?.(".bridle .token") ? show(event.target) : hide());
  document.addEventListener("scroll", hide, true);

  // Gradio draws a text anew with each token; the token that had the focus gets it back.
  let focused = null;
  document.addEventListener("focusin", ({target}) => {
    const text = target.matches?.(".bridle .token") ? target.closest("[id^=tokens-]") : null;
    focused = text && [text.id, [...text.querySelectorAll(".token")].indexOf(target)];
  });
  document.addEventListener("pointerdown", ({target}) => { if (!target.closest?.(".bridle .token")) focused = null; });
  new MutationObserver(() => {
    if (focused && document.activeElement === document.body)
      document.getElementById(focused[0])?.querySelectorAll(".token")[focused[1]]?.focus({preventScroll: true});
  }).observe(document.documentElement, {childList: true, subtree: true});

  // Tab enters and leaves a row of tokens or dots, arrow keys move within it; Escape hides the card.
  const MOVES = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1};
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    const bar = event.target.closest?.(".bridle [role=toolbar]");
    if (!bar) return;
    const all = [...bar.querySelectorAll("button")];
    const at = all.indexOf(event.target);
    const next = {Home: all[0], End: all.at(-1)}[event.key] ?? (event.key in MOVES ? all[at + MOVES[event.key]] : null);
    if (!next) return;
    event.preventDefault();
    for (const one of all) one.tabIndex = one === next ? 0 : -1;
    next.focus();
  });

  function lift(button) {
    const shown = button.getAttribute("aria-expanded") !== "true";
    const text = document.getElementById(button.getAttribute("aria-controls"));
    button.setAttribute("aria-expanded", String(shown));
    button.querySelector("span").textContent = shown ? "hide" : "show";
    text.inert = !shown;
    shown ? text.removeAttribute("aria-hidden") : text.setAttribute("aria-hidden", "true");
  }

  // A dot opens its text, and closes it when it is pressed again.
  function open(dot) {
    const shown = dot.getAttribute("aria-expanded") !== "true";
    const drawn = dot.closest("article");
    for (const one of drawn.querySelectorAll(".dot")) one.setAttribute("aria-expanded", String(shown && one === dot));
    drawn.querySelector(".opened").textContent = shown ? dot.dataset.text || "(empty)" : "";
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.(".bridle button");
    if (!button) return;
    if (button.matches(".lift")) lift(button);
    if (button.matches(".dot")) open(button);
    if (button.matches(".token")) button.focus();
  });
})();
