// The last minutes as lines. A chart takes what it shows from samples: see server/samples.py.

import { byId, make, svg } from "./elements.js";
import { clock, duration, percent, rate } from "./words.js";

export const WINDOW = 300; // seconds in a chart
const BIN = 3; // seconds in a point of a chart
const SUMS = [
  "seconds", "asked", "memory", "below", "save", "load", "read", "write", "lookups",
];

// Single seconds jitter: a point stands for a few of them.
export function merge(samples) {
  const points = [];
  for (const sample of samples) {
    const slot = Math.floor(sample.at / BIN);
    const last = points[points.length - 1];
    if (!last || last.slot !== slot) {
      points.push({ ...sample, slot });
      continue;
    }
    const lookups = last.lookups + sample.lookups;
    const median = lookups
      ? ((last.p50 ?? 0) * last.lookups + (sample.p50 ?? 0) * sample.lookups) / lookups : null;
    const slow = [last.p99, sample.p99].filter((value) => value !== null);
    for (const name of SUMS) last[name] += sample[name];
    Object.assign(last, { at: sample.at, p50: median, p99: slow.length ? Math.max(...slow) : null });
  }
  return points;
}

export const charts = [
  {
    id: "chart-hits", title: "Hit rate", note: "of tokens asked for", stacked: true, format: percent,
    scale: () => linear(1),
    series: [
      { name: "memory", style: "s-memory", of: (s) => s.asked ? s.memory / s.asked : null },
      { name: "below", style: "s-disk", of: (s) => s.asked ? s.below / s.asked : null },
      { name: "together", of: (s) => s.asked ? (s.memory + s.below) / s.asked : null },
    ],
  },
  {
    id: "chart-bytes", title: "Throughput", note: "bytes a second", format: rate,
    scale: (highest) => linear(round(Math.max(highest, 1000))),
    series: [
      { name: "load", style: "s-memory", of: (s) => s.load / s.seconds },
      { name: "save", style: "s-save", of: (s) => s.save / s.seconds },
      { name: "from below", style: "s-disk", of: (s) => s.read / s.seconds },
      { name: "to below", style: "s-write", of: (s) => s.write / s.seconds },
    ],
  },
  {
    id: "chart-latency", title: "Lookup latency", note: "in the daemon", format: duration,
    scale: (highest) => decades(1e-5, Math.max(highest, 1e-3)),
    series: [
      { name: "p50", style: "s-memory", of: (s) => s.p50 },
      { name: "p99", style: "s-write", of: (s) => s.p99 },
      { name: "lookups", format: (n) => `${n.toFixed(n < 10 ? 1 : 0)} /s`, of: (s) => s.lookups / s.seconds },
    ],
  },
];

// Scales: where a value lies between 0 and 1, and the values that get a line.
function linear(top) {
  return { place: (value) => value / top, ticks: [0, top / 2, top] };
}

function decades(low, highest) {
  const count = Math.ceil(Math.log10(highest / low) - 1e-9);
  return {
    place: (value) => Math.max(0, Math.log10(value / low)) / count,
    ticks: Array.from({ length: count + 1 }, (_, n) => low * 10 ** n),
  };
}

// The next 1, 2 or 5 times a power of ten.
function round(highest) {
  const power = 10 ** Math.floor(Math.log10(highest));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= highest * 0.999);
}

export function buildChart(chart, points) {
  const card = byId(chart.id);
  const title = make("h2", "", chart.title);
  title.id = `${chart.id}-title`;
  card.setAttribute("aria-labelledby", title.id);
  chart.when = make("span", "muted");
  chart.values = chart.series.map(() => make("b"));
  const keys = chart.series.map(({ style, name }, i) =>
    make("span", style, ...(style ? [make("i")] : []), `${name} `, chart.values[i]));
  chart.svg = svg("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" });
  chart.grid = svg("g", {});
  chart.svg.append(chart.grid);
  chart.lines = chart.series.map(({ style }) => {
    const area = svg("path", { class: `area ${style}` });
    const line = svg("path", { class: `series ${style}` });
    if (style) chart.svg.append(area, line);
    return { area, line };
  });
  chart.cursor = svg("line", { class: "cursor", y1: 0, y2: 100, visibility: "hidden" });
  chart.svg.append(chart.cursor);
  chart.labels = make("div", "labels");
  const plot = make("div", "plot");
  plot.append(chart.svg, chart.labels);
  chart.svg.addEventListener("pointermove", (event) => {
    const box = chart.svg.getBoundingClientRect();
    chart.hover = (event.clientX - box.left) / box.width;
    drawChart(chart, points());
  });
  chart.svg.addEventListener("pointerleave", () => { chart.hover = null; drawChart(chart, points()); });
  card.append(
    make("div", "top", title, chart.when), make("div", "keys", ...keys), plot,
    make("div", "axis", make("span", "", "5 min ago"), make("span", "", "now")));
}

export function drawChart(chart, points) {
  const end = points.length ? points[points.length - 1].at : 0;
  const drawn = chart.series.filter((series) => series.style);
  const x = (point) => 100 - ((end - point.at) / WINDOW) * 100;
  const rows = points.map((point) => chart.series.map((series) => series.of(point)));
  const highest = rows.map((row) => Math.max(0, ...row.slice(0, drawn.length).filter((v) => v !== null)));
  const { place, ticks } = chart.scale(Math.max(0, ...highest));
  const y = (value) => 100 - place(value) * 100;
  chart.grid.replaceChildren(...ticks.map((tick) =>
    svg("line", { class: "grid", x1: 0, x2: 100, y1: y(tick), y2: y(tick) })));
  chart.labels.replaceChildren(...ticks.map((tick) => {
    const label = make("span", "", tick ? chart.format(tick).replace(/\.0+(?= )/, "") : "0");
    label.style.top = `${y(tick)}%`;
    return label;
  }));
  const below = rows.map(() => 0);
  drawn.forEach((series, i) => {
    let line = "";
    let area = "";
    let run = []; // points since the last gap: x, y and the y below
    const finish = () => {
      if (run.length === 1) run.push([run[0][0] + 0.3, run[0][1], run[0][2]]);
      if (!run.length) return;
      const path = (xs, which) => xs.map((p) => `${p[0].toFixed(2)} ${p[which].toFixed(2)}`).join("L");
      line += `M${path(run, 1)}`;
      area += `M${path(run, 1)}L${path(run.toReversed(), 2)}Z`;
      run = [];
    };
    rows.forEach((row, n) => {
      if (row[i] === null) { finish(); return; }
      const base = chart.stacked ? below[n] : 0;
      if (chart.stacked) below[n] += row[i];
      run.push([x(points[n]), y(base + row[i]), 100 - place(base) * 100]);
    });
    finish();
    chart.lines[i].line.setAttribute("d", line);
    chart.lines[i].area.setAttribute("d", chart.stacked ? area : "");
  });
  let shown = rows.length - 1;
  if (chart.hover != null && rows.length) {
    const at = end - (1 - chart.hover) * WINDOW;
    const distance = points.map((point) => Math.abs(point.at - at));
    shown = distance.indexOf(Math.min(...distance));
    for (const name of ["x1", "x2"]) chart.cursor.setAttribute(name, x(points[shown]));
  }
  const hovered = chart.hover != null && rows.length > 0;
  chart.cursor.setAttribute("visibility", hovered ? "visible" : "hidden");
  chart.when.textContent = hovered ? clock(points[shown].at) : chart.note;
  chart.values.forEach((element, i) => {
    const value = rows[shown]?.[i] ?? null;
    element.textContent = value === null ? "–" : (chart.series[i].format ?? chart.format)(value);
  });
}
