"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

function shown(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "share") return (100 * value).toFixed(1) + "\u00a0%";
  if (value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6)) return String(Number(value.toPrecision(4)));
  return value.toExponential(2);
}

function duration(seconds) {
  if (seconds < 120) return seconds.toFixed(0) + " s";
  return seconds < 7200 ? (seconds / 60).toFixed(1) + " min" : (seconds / 3600).toFixed(2) + " h";
}

function nearest(sorted, x) {
  let best = 0;
  sorted.forEach((y, index) => { if (y !== null && Math.abs(y - x) < Math.abs(sorted[best] - x)) best = index; });
  return best;
}

// A chart is a slider over its points: the numbers of one stand below it, by pointer or by arrow keys.
for (const plot of document.querySelectorAll(".plot")) {
  const figure = plot.closest("figure"), drawn = data.figures[figure.id], xs = drawn[plot.dataset.axis];
  const area = plot.querySelector(".area"), cursor = plot.querySelector(".cursor"), line = figure.querySelector(".read-out");
  const numbers = figure.querySelectorAll(".legend b"), right = Number(plot.dataset.right);
  let place = xs.length - 1;
  const move = (to, seen = true) => {
    place = Math.max(0, Math.min(xs.length - 1, to));
    const step = drawn.step[place];
    const when = "step " + shown(Math.round(step)) + (drawn.time[place] === null ? "" : ", " + duration(drawn.time[place]));
    const values = drawn.series.map((s) => {
      if (!seen) return shown(s.values.at(-1), drawn.unit);
      const near = nearest(s.step, step), gap = s.dots ? 0.5 + (drawn.step.at(-1) - drawn.step[0]) / drawn.step.length / 2 : Infinity;
      return step > s.step.at(-1) || Math.abs(s.step[near] - step) > gap ? "–" : shown(s.values[near], drawn.unit);
    });
    line.textContent = seen || data.runs === 1 ? when : "last of each run";
    values.forEach((value, series) => { numbers[series].textContent = value; });
    plot.setAttribute("aria-valuetext", when + ": " + drawn.series.map((s, series) => s.label + " " + values[series]).join(", "));
    plot.setAttribute("aria-valuenow", place);
    cursor.style.left = 100 * xs[place] / right + "%";
    cursor.hidden = !seen;
  };
  plot.setAttribute("aria-valuemax", place);
  move(place, false);
  plot.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    move(nearest(xs, right * (event.clientX - box.left) / box.width));
  });
  plot.addEventListener("pointerleave", () => move(xs.length - 1, false));
  plot.addEventListener("focus", () => move(place));
  plot.addEventListener("blur", () => { cursor.hidden = true; });
  plot.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10, Home: -1e9, End: 1e9 }[event.key];
    if (by) { move(place + by); event.preventDefault(); }
  });
}

// A response is a list of tokens with one stop of the Tab key; the arrow keys go through it.
for (const list of document.querySelectorAll(".tokens")) {
  const tokens = [...list.children], numbers = Object.entries(data.rollouts[list.dataset.number]);
  const line = list.closest("article").querySelector(".read-out");
  let active = null;
  tokens.forEach((token, place) => {
    token.setAttribute("role", "option");
    token.setAttribute("aria-label", place + 1 + ": " + (token.textContent.trim() || "space"));
    token.id = "t" + list.dataset.number + "-" + place;
  });
  const choose = (place) => {
    if (active !== null) { tokens[active].classList.remove("on"); tokens[active].removeAttribute("aria-selected"); }
    active = place;
    line.replaceChildren();
    if (place === null) return list.removeAttribute("aria-activedescendant");
    tokens[place].classList.add("on");
    tokens[place].setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", tokens[place].id);
    const name = document.createElement("b");
    name.textContent = "token " + (place + 1) + " “" + tokens[place].textContent + "”";
    line.append(name, numbers.map(([label, values]) => "  ·  " + label + " " + shown(values[place])).join(""));
  };
  list.addEventListener("pointerover", (event) => { if (event.target !== list) choose(tokens.indexOf(event.target)); });
  list.addEventListener("focus", () => { if (active === null && tokens.length) choose(0); });
  list.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowUp: -10, ArrowRight: 1, ArrowDown: 10, Home: -1e9, End: 1e9 }[event.key];
    if (by) {
      choose(Math.max(0, Math.min(tokens.length - 1, (active ?? 0) + by)));
      tokens[active].scrollIntoView({ block: "nearest" });
      event.preventDefault();
    }
  });
}
