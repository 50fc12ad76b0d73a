"use strict";
// A chart of lines in SVG: axes, linear or logarithmic, bands, the value under the pointer, and zoom. It knows nothing of losses.
const make = (tag, attributes = {}, ...children) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
};

// Round numbers from low to high, about as many as `most`; on a log axis 1, 2 and 5 times powers of ten, or powers alone.
function ticks(low, high, most, log) {
  if (log && high / low > 3) {
    const powers = Array.from({ length: 40 }, (_, i) => 10 ** (i - 20)).filter((p) => p >= low / 10 && p <= high);
    for (const parts of [[1, 2, 5], [1, 3], [1]]) {
      const found = powers.flatMap((p) => parts.map((m) => m * p)).filter((v) => v >= low && v <= high);
      if (found.length <= most || parts.length === 1) return found.filter((_, i) => i % Math.ceil(found.length / most) === 0);
    }
  }
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.max(0, Math.floor(high / step + 1e-9) - first + 1) }, (_, i) => (first + i) * step);
}

function shown(value) {
  const size = Math.abs(value);
  return size >= 1e6 || (size > 0 && size < 1e-3) ? value.toExponential(2).replace(/\.?0+e/, "e") : (+value.toPrecision(5)).toLocaleString("en");
}

class Chart {
  constructor(node) {
    this.node = node;
    this.zoom = null; // [left, right, bottom, top], where the reader chose a part
    this.whole = false;
    new ResizeObserver(() => this.lines && this.render()).observe(node);
    node.addEventListener("pointermove", (event) => this.point(event));
    node.addEventListener("pointerleave", () => this.told?.remove());
    node.addEventListener("pointerdown", (event) => this.begin(event));
    node.addEventListener("dblclick", () => {
      this.whole = this.zoom === null && !this.whole;
      this.zoom = null;
      this.render();
    });
  }

  // lines: {name, x, y, colour, width, dash, low, high, quiet, lost}; view: {title, xLog, yLog, range, from, to}
  draw(lines, view) {
    if (this.view && (this.view.title !== view.title || this.view.yLog !== view.yLog || this.view.xLog !== view.xLog)) this.zoom = null;
    this.lines = lines;
    this.view = view;
    this.render();
  }

  // What the axes reach over: what the reader chose, what the page says, or all there is.
  limits() {
    if (this.zoom) return this.zoom;
    const { view } = this;
    const xs = this.lines.flatMap((l) => l.x), ys = this.lines.flatMap((l) => [...l.y, ...(l.low ?? []), ...(l.high ?? [])]);
    const positive = (log) => (v) => Number.isFinite(v) && (!log || v > 0);
    const reach = (values, log) => values.filter(positive(log)).reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    let [left, right] = reach([...xs, ...(view.xLog ? [] : [view.from ?? Infinity]), view.to ?? -Infinity], view.xLog);
    let [bottom, top] = reach(ys, view.yLog);
    if (view.range && !view.yLog && !this.whole) [bottom, top] = view.range;
    if (!(left < right)) [left, right] = view.xLog ? [left / 2 || 1, left * 2 || 10] : [(left || 0) - 1, (left || 0) + 1];
    if (!(bottom < top)) [bottom, top] = Number.isFinite(bottom) ? [bottom - Math.abs(bottom) / 2 - 1e-9, bottom + Math.abs(bottom) / 2 + 1e-9] : [1, 2];
    else if (!view.range || view.yLog || this.whole) [bottom, top] = view.yLog ? [bottom / 1.05, top * 1.05] : [bottom - 0.03 * (top - bottom), top + 0.03 * (top - bottom)];
    return [left, right, bottom, top];
  }

  render() {
    const { node, view } = this, width = node.clientWidth, height = node.clientHeight;
    const [left, right, bottom, top] = (this.reach = this.limits());
    const yTicks = ticks(bottom, top, Math.max(3, height / 55), view.yLog), xTicks = ticks(left, right, Math.max(2, width / 80), view.xLog);
    const half = 2 + 3.5 * shown(xTicks.at(-1) ?? 0).length; // of the last tick's text, which stands around the edge
    const margin = { l: 12 + 7 * Math.max(...yTicks.map((v) => shown(v).length), 1), r: Math.max(12, half), t: 8, b: 40 };
    const w = Math.max(10, width - margin.l - margin.r), h = Math.max(10, height - margin.t - margin.b);
    const scale = (from, to, length, log) => (v) => {
      const f = log ? Math.log : (u) => u;
      return ((f(v) - f(from)) / (f(to) - f(from))) * length;
    };
    const sx = scale(left, right, w, view.xLog), sy = scale(bottom, top, h, view.yLog);
    this.x = (v) => margin.l + sx(v);
    this.y = (v) => margin.t + h - sy(v);
    this.box = { ...margin, w, h };
    const paper = make("svg", { width, height, role: "img" });
    for (const v of yTicks) {
      paper.append(make("line", { class: "grid", x1: margin.l, x2: margin.l + w, y1: this.y(v), y2: this.y(v) }));
      paper.append(make("text", { class: "ytick", x: margin.l - 6, y: this.y(v) + 4, "text-anchor": "end" }, shown(v)));
    }
    for (const v of xTicks) {
      paper.append(make("line", { class: "grid", x1: this.x(v), x2: this.x(v), y1: margin.t, y2: margin.t + h }));
      paper.append(make("text", { class: "xtick", x: this.x(v), y: margin.t + h + 16, "text-anchor": "middle" }, shown(v)));
    }
    paper.append(make("text", { class: "xtitle", x: margin.l + w / 2, y: height - 4, "text-anchor": "middle" }, view.title));
    const id = `clip-${node.id}`;
    paper.append(make("clipPath", { id }, make("rect", { x: margin.l, y: margin.t - 1, width: w, height: h + 2 })));
    const area = make("g", { "clip-path": `url(#${id})` });
    for (const line of this.lines) area.append(...this.marks(line));
    paper.append(area, ...this.lines.filter((l) => l.lost).map((line) => this.end(line)));
    node.replaceChildren(paper);
    node.dispatchEvent(new CustomEvent("drawn"));
  }

  path(xs, ys) {
    const { xLog, yLog } = this.view;
    let out = "", pen = "M";
    xs.forEach((x, i) => {
      const there = Number.isFinite(ys[i]) && (!yLog || ys[i] > 0) && (!xLog || x > 0);
      if (there) out += `${pen}${this.x(x).toFixed(1)} ${this.y(ys[i]).toFixed(1)}`;
      pen = there ? "L" : "M";
    });
    return out;
  }

  marks(line) {
    const out = [];
    if (line.low) {
      const back = this.path([...line.x].reverse(), [...line.low].reverse());
      out.push(make("path", { class: "band", d: `${this.path(line.x, line.high)}${back.replace("M", "L")}Z`, fill: line.colour }));
    }
    const style = { stroke: line.colour, "stroke-width": line.width ?? 2, "stroke-dasharray": line.dash ?? "none" };
    out.push(make("path", { class: line.quiet ? "line quiet-line" : "line", d: this.path(line.x, line.y), ...style }));
    if (line.x.length <= 20 && !line.quiet)
      line.x.forEach((x, i) => Number.isFinite(line.y[i]) && out.push(make("circle", { cx: this.x(x), cy: this.y(line.y[i]), r: 2.5, fill: line.colour })));
    return out;
  }

  // Where a line was lost: a cross, at the top where the line had left the chart.
  end(line) {
    const x = this.x(line.x.at(-1)), y = Math.max(this.box.t + 5, Math.min(this.box.t + this.box.h, this.y(line.y.at(-1)) || 0));
    return make("path", { class: "lost", d: `M${x - 4} ${y - 4}l8 8m0 -8l-8 8`, stroke: line.colour });
  }

  // Names of the lines that go above the top after `from`, each with its highest value.
  above(from) {
    const found = new Map();
    for (const line of this.lines)
      line.y.forEach((y, i) => {
        if (!line.quiet && y > this.reach[3] && (line.lost || line.x[i] >= from)) found.set(line.name, Math.max(y, found.get(line.name) ?? y));
      });
    return found;
  }

  point(event) {
    this.told?.remove();
    if (!this.lines || event.buttons) return;
    const frame = this.node.getBoundingClientRect(), px = event.clientX - frame.left, py = event.clientY - frame.top;
    let best = null, least = 40;
    for (const line of this.lines)
      if (!line.quiet)
        line.x.forEach((x, i) => {
          const far = Math.hypot(this.x(x) - px, this.y(line.y[i]) - py);
          if (far < least) [best, least] = [{ line, i }, far];
        });
    if (!best) return;
    const { line, i } = best, x = this.x(line.x[i]), y = this.y(line.y[i]);
    this.told = document.createElement("div");
    this.told.className = "told";
    const name = document.createElement("b");
    name.textContent = line.name + (line.lost ? " (diverged)" : "");
    this.told.append(name, document.createElement("br"), `${this.view.unit} ${shown(line.x[i])}: ${line.y[i].toPrecision(5)}`);
    this.node.append(this.told);
    const side = x > this.node.clientWidth / 2;
    Object.assign(this.told.style, { left: side ? "auto" : `${x + 10}px`, right: side ? `${this.node.clientWidth - x + 10}px` : "auto", top: `${Math.max(0, y - 44)}px` });
  }

  // A part is chosen with the mouse; a finger scrolls the page.
  begin(event) {
    if (event.pointerType !== "mouse" || event.button) return;
    const frame = this.node.getBoundingClientRect(), place = (e) => [e.clientX - frame.left, e.clientY - frame.top];
    const start = place(event), rect = make("rect", { class: "chosen" });
    this.node.firstChild.append(rect);
    const move = (e) => {
      const now = place(e), at = [0, 1].map((n) => Math.min(start[n], now[n])), size = [0, 1].map((n) => Math.abs(start[n] - now[n]));
      for (const [name, value] of Object.entries({ x: at[0], y: at[1], width: size[0], height: size[1] })) rect.setAttribute(name, value);
    };
    const stop = (e) => {
      removeEventListener("pointermove", move);
      removeEventListener("pointerup", stop);
      rect.remove();
      const now = place(e);
      if (Math.abs(now[0] - start[0]) < 8 || Math.abs(now[1] - start[1]) < 8) return;
      const [a, b, c, d] = [Math.min(start[0], now[0]), Math.max(start[0], now[0]), Math.max(start[1], now[1]), Math.min(start[1], now[1])];
      this.zoom = [this.value(a, 0), this.value(b, 0), this.value(c, 1), this.value(d, 1)];
      this.render();
    };
    addEventListener("pointermove", move);
    addEventListener("pointerup", stop);
  }

  // The value at a place on the screen, along x (0) or y (1).
  value(place, way) {
    const { box, view, reach } = this, share = way ? (box.t + box.h - place) / box.h : (place - box.l) / box.w;
    const [from, to] = way ? [reach[2], reach[3]] : [reach[0], reach[1]];
    return (way ? view.yLog : view.xLog) ? from * (to / from) ** share : from + (to - from) * share;
  }
}
