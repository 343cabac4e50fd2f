// The same model as link.py: draws the chart against time, its table and the bars of the sites for another line.
"use strict";
const data = JSON.parse(document.getElementById("line-data").textContent);
const input = (id) => document.getElementById(id);
const svgOf = (id) => document.getElementById(id + "-t")?.parentNode;
const sum = (list) => list.reduce((a, b) => a + b, 0);
const mean = (list) => sum(list) / list.length;
const short = (value) => String(Number(value.toPrecision(3)));

function clock(s) {
  if (s < 120) return s.toFixed(Number.isInteger(s) || s >= 99.95 ? 0 : s >= 9.995 ? 1 : 2) + " s";
  if (s < 172800) return s < 7200 ? (s / 60).toFixed(1) + " min" : (s / 3600).toFixed(1) + " h";
  return (s / 86400).toFixed(1) + " d";
}
const rate = (mbit) => (mbit >= 1000 ? short(mbit / 1000) + " Gbit/s" : short(mbit) + " Mbit/s");

function chosen() {
  const pick = (id) => data[id + "s"][input(id).value];
  return { rate: pick("rate"), trip: pick("trip"), speed: pick("speed") };
}
const parts = (line, [s, bytes, messages]) =>
  [s / line.speed, (8e-6 * bytes) / line.rate, ((messages / 2) * line.trip) / 1000];
const need = (line, load) => sum(parts(line, load));
const critical = (line, run) => run.worst.reduce((a, b) => (need(line, b) > need(line, a) ? b : a));
const total = (line, run) => need(line, critical(line, run)) + run.server;
function until(line, run, place) {
  const [s, bytes, messages, server] = run.rounds[place];
  const whole = need(line, run.whole);
  return server + (whole ? (need(line, [s, bytes, messages]) * need(line, critical(line, run))) / whole : 0);
}

function draw(line) {
  const svg = svgOf("quality-seconds");
  const at = Object.entries(data.of).map(([name, of]) =>
    [name, of.y.map((_, place) => mean(of.runs.map((run) => until(line, run, place))))]);
  const all = at.flatMap(([, xs]) => xs);
  if (!svg || !all.length) return;
  const [least, most] = [Math.min(...all), Math.max(...all)];
  const ratio = most > least ? (most / least) ** 0.06 : 2;
  const [low, high] = [least / ratio, most * ratio];
  const pixel = (x) => data.left + (Math.log(x / low) / Math.log(high / low)) * (data.right - data.left);
  const marks = data.clock.filter((mark) => mark >= low && mark <= high);
  const few = [];
  let end = -1;
  for (const mark of marks) {
    const words = clock(mark).replace(/(\.\d*?)0+ /, "$1 ").replace(". ", " ");
    if (pixel(mark) - 3.5 * words.length <= end) continue;
    end = pixel(mark) + 3.5 * words.length + 4;
    few.push([pixel(mark), words]);
  }
  svg.querySelector(".ticks").replaceChildren(...few.flatMap(([x, words]) => [
    make("line", { x1: x, x2: x, y1: data.bottom, y2: data.bottom + 4, class: "axis" }),
    make("text", { x, y: data.bottom + 18, "text-anchor": "middle", class: "tick" }, words),
  ]));
  const taken = [];
  for (const [name, xs] of at) {
    const ys = data.of[name].y.map((y) => y.toFixed(1));
    const group = [...svg.querySelectorAll("g[data-of]")].find((one) => one.dataset.of === name);
    const label = [...svg.querySelectorAll("text[data-of]")].find((one) => one.dataset.of === name);
    if (!group) continue;
    const spots = xs.map((x, place) => pixel(x).toFixed(1) + " " + ys[place]);
    group.querySelector(".curve").setAttribute("d", "M" + spots.join("L"));
    const dots = group.querySelectorAll("g");
    dots.forEach((dot, place) => dot.setAttribute("transform", "translate(" + spots[place] + ")"));
    place(label, pixel(xs.at(-1)), Number(ys.at(-1)), taken);
  }
}
function place(label, x, y, taken) {
  const width = 7 * label.textContent.length;
  let left = x + 10;
  if (left + width > data.width) left = x - 10 - width;
  let base = y + 4;
  while (taken.some(([l, b]) => Math.abs(l - left) < width && Math.abs(b - base) < 16)) base -= 16;
  taken.push([left, base]);
  label.setAttribute("x", left);
  label.setAttribute("y", base);
  label.setAttribute("text-anchor", "start");
}
function make(tag, attributes, words) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (words) node.textContent = words;
  return node;
}

function update() {
  const line = chosen();
  const told = { rate: rate(line.rate), trip: line.trip + " ms", speed: short(line.speed) + "×" };
  for (const id of ["rate", "trip", "speed"]) {
    input(id).setAttribute("aria-valuetext", told[id]);
    input(id + "-value").textContent = told[id];
  }
  for (const row of document.querySelectorAll("tr[data-of]")) {
    const runs = data.of[row.dataset.of].runs;
    const sums = [0, 1, 2].map((k) => mean(runs.map((run) => parts(line, critical(line, run))[k])));
    sums.push(mean(runs.map((run) => run.server)), mean(runs.map((run) => total(line, run))));
    row.querySelectorAll("td").forEach((cell, place) => (cell.textContent = clock(sums[place])));
  }
  for (const bar of document.querySelectorAll("g[data-load]")) {
    const load = JSON.parse(bar.dataset.load);
    const lasts = mean(data.of[bar.dataset.of].runs.map((run) => total(line, run)));
    const [s, bytes, trips] = parts(line, load);
    const [work, wire] = bar.querySelectorAll(".work, .wire");
    const room = Number(bar.dataset.room);
    work.setAttribute("width", (room * s) / lasts);
    wire.setAttribute("x", Number(work.getAttribute("x")) + (room * s) / lasts);
    wire.setAttribute("width", (room * (bytes + trips)) / lasts);
    bar.querySelector("text.value").textContent = Math.round((100 * Math.max(0, lasts - s - bytes - trips)) / lasts) + " %";
  }
  draw(line);
}

document.getElementById("line").hidden = false;
for (const id of ["rate", "trip", "speed"]) input(id).addEventListener("input", update);
