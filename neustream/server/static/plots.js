// Plots as SVG. Each outcome has a colour and a shape; all text goes in as text.

const SVG = "http://www.w3.org/2000/svg";

export const OUTCOMES = {
  on_time: { label: "on time", path: "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0" },
  late: { label: "late", path: "M0 -4L4 3.5H-4Z" },
  dropped: { label: "dropped", path: "M-3.5 -3.5L3.5 3.5M3.5 -3.5L-3.5 3.5" },
  failed: { label: "failed", path: "M-3.5 -3.5H3.5V3.5H-3.5Z" },
};

export function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

export function mark(outcome, x = 0, y = 0) {
  const path = svg("path", { class: "mark", d: OUTCOMES[outcome].path, transform: `translate(${x} ${y})` });
  return svg("g", { class: outcome }, path);
}

/** A small line of the values so far; a gap where there were none. */
export function line(values, label, width = 120, height = 24) {
  const known = values.filter((value) => value !== null);
  const top = Math.max(...known, 1e-9);
  let path = "", pen = "M";
  values.forEach((value, at) => {
    if (value === null) { pen = "M"; return; }
    const x = width - (values.length - at) * (width / 120);
    path += `${pen}${x.toFixed(1)} ${(height - 2 - (value / top) * (height - 4)).toFixed(1)}h1`;
    pen = "L";
  });
  const last = known.length ? known[known.length - 1] : "none";
  const name = `${label}: now ${last}, most ${known.length ? top : "none"}`;
  return svg("svg", { width, height, role: "img", "aria-label": name }, svg("path", { class: "trace", d: path || "M0 0" }));
}

function nice(most) {
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 5, 10].map((one) => one * power).find((one) => one >= most);
}

/** Latency against what was asked for, a mark a request. */
export function scatter(dots, what) {
  const width = 520, height = 260, left = 48, bottom = 40, right = 12, above = 12;
  const most = [nice(Math.max(...dots.map((dot) => dot[2] || 0), 1)), nice(Math.max(...dots.map((dot) => dot[3]), 0.01))];
  const x = (value) => left + (value / most[0]) * (width - left - right);
  const y = (value) => height - bottom - (value / most[1]) * (height - bottom - above);
  const parts = [svg("path", { class: "axis", d: `M${left} ${above}V${height - bottom}H${width - right}` })];
  const text = (content, at) => parts.push(svg("text", at, content));
  for (const share of [0, 0.5, 1]) {
    text(`${+(most[0] * share).toPrecision(3)}`, { x: x(most[0] * share), y: height - bottom + 16, "text-anchor": "middle" });
    text(`${+(most[1] * share).toPrecision(3)}`, { x: left - 6, y: y(most[1] * share) + 4, "text-anchor": "end" });
  }
  text(`${what} asked for`, { x: (left + width) / 2, y: height - 6, "text-anchor": "middle" });
  text("latency, s", { x: 0, y: 0, transform: `translate(12 ${height / 2}) rotate(-90)`, "text-anchor": "middle" });
  const counts = Object.keys(OUTCOMES).map((name) => [name, dots.filter((dot) => dot[4] === name).length]);
  for (const dot of dots) parts.push(mark(dot[4], x(dot[2] || 0).toFixed(1), y(dot[3]).toFixed(1)));
  const said = counts.map(([name, count]) => `${count} ${OUTCOMES[name].label}`).join(", ");
  const label = `Latency in seconds against ${what} asked for, last ${dots.length} requests: ${said}`;
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ...parts);
  return [plot, counts];
}
