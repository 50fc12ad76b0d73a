"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { series, range, last, beginning, smooth } = data;
  const chips = [...document.querySelectorAll(".chip")];
  const hidden = new Set();
  const charts = Object.fromEntries([...document.querySelectorAll(".chart")].map((node) => [node.id, new Chart(node)]));
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const field = (name) => document.querySelector(`[name=${name}]`);
  const chosen = (name) => document.querySelector(`input[name=${name}]:checked`)?.value;

  // Mean of the last `width` values, fewer at the start.
  function smoothed(values, width) {
    let sum = 0;
    return values.map((value, i) => {
      sum += value - (i >= width ? values[i - width] : 0);
      return sum / Math.min(width, i + 1);
    });
  }

  // Of a method: the mean of its seeds with a band from the lowest to the highest, and each seed that diverged by itself.
  function lines(one, chart, width) {
    const overTime = chosen("axis") === "seconds";
    if (hidden.has(one.name) || (overTime && one.seconds === null)) return [];
    const look = { name: one.name, colour: css(one.colour), dash: one.dash };
    const xs = (line) => (overTime ? line.x.map((step) => step * one.seconds) : line.x);
    const ys = (line) => (chart === "train" ? smoothed(line.y, width) : line.y);
    const ended = one[chart].filter((line) => !line.lost), out = [];
    if (ended.length) {
      const length = Math.min(...ended.map((line) => line.x.length));
      const each = ended.map((line) => ys(line).slice(0, length)), at = (f) => each[0].map((_, i) => f(each.map((y) => y[i])));
      if (ended.length === 1 && series.length === 1 && chart === "train" && width > 1)
        out.push({ ...look, x: xs(ended[0]), y: ended[0].y, width: 1, quiet: true });
      const band = ended.length > 1 ? { low: at((v) => Math.min(...v)), high: at((v) => Math.max(...v)) } : {};
      out.push({ ...look, x: xs(ended[0]).slice(0, length), y: at((v) => v.reduce((a, b) => a + b) / v.length), ...band });
    }
    for (const line of one[chart].filter((l) => l.lost)) out.push({ ...look, x: xs(line), y: ys(line), width: 1, lost: true });
    return out;
  }

  const step = Math.max(1, Math.round(last / Math.max(1, ...series.flatMap((one) => one.train.map((line) => line.x.length)))));

  function draw() {
    const overTime = chosen("axis") === "seconds", width = Number(field("smoothing")?.value ?? 1);
    const view = {
      title: overTime ? "training time, s" : "step (mini-batches)", unit: overTime ? "s" : "step", range,
      xLog: field("log-x")?.checked, yLog: field("log-y")?.checked, from: 0, to: overTime ? undefined : last,
    };
    for (const id of ["train", "validation"]) charts[id].draw(series.flatMap((one) => lines(one, id, width)), view);
    for (const chip of chips) chip.setAttribute("aria-pressed", String(!hidden.has(chip.dataset.method)));
    if (field("smoothing")) document.getElementById("smoothed").textContent = width > 1 ? `mean of ${width * step} steps` : step > 1 ? `mean of ${step} steps` : "none";
    if (charts.prediction) {
      const measured = data.prediction.map((one) => ({ ...one, colour: css(one.colour) }));
      const ends = measured.flatMap((one) => one.x);
      const none = { name: "no prediction", x: [Math.min(...ends), Math.max(...ends)], y: [1, 1], colour: css("--quiet"), width: 1, dash: "4 4", quiet: true };
      charts.prediction.draw([...measured, none], { title: "version (updates)", unit: "version", range: [0, 1.05 * Math.max(1, ...measured.flatMap((one) => one.y))] });
    }
  }

  // No divergence is hidden without a word: what lies above a chart is named below it.
  for (const id of ["train", "validation"]) {
    charts[id].node.addEventListener("drawn", () => {
      const reach = charts[id].reach, above = charts[id].above(reach[0] + beginning * (reach[1] - reach[0]));
      const told = [...above].map(([name, highest]) => `${name} (up to ${shown(highest)})`);
      document.getElementById(`${id}-cut`).textContent = told.length ? `Above the top: ${told.join(", ")}. Double-click the chart, or choose a logarithmic axis, to see it.` : "";
    });
  }

  for (const chip of chips) {
    const name = chip.dataset.method;
    chip.addEventListener("click", (event) => {
      if (event.detail > 1) return; // the second half of a double click
      hidden.has(name) ? hidden.delete(name) : hidden.add(name);
      draw();
    });
    chip.addEventListener("dblclick", () => {
      const alone = series.every((s) => (s.name === name) !== hidden.has(s.name) || s.name === name) && hidden.size >= series.length - 1;
      hidden.clear();
      if (!alone) for (const s of series) if (s.name !== name) hidden.add(s.name);
      draw();
    });
  }
  if (field("smoothing")) field("smoothing").value = Math.max(1, Math.floor(Math.max(...series.flatMap((one) => one.train.map((line) => line.x.length)), 0) / smooth));
  for (const input of document.querySelectorAll(".switches input")) input.addEventListener("input", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();

  for (const input of document.querySelectorAll("input[name=zoom]")) {
    const picture = input.closest("figure").querySelector("svg");
    const width = picture.getBoundingClientRect().width; // as the page shows it at first
    input.addEventListener("input", () => Object.assign(picture.style, { width: `${width * input.value}px`, maxWidth: "none" }));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) =>
      head.querySelector("button").addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = (row) => row.cells[column].dataset.key;
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          if (x === undefined && y === undefined) return a.cells[column].textContent.localeCompare(b.cells[column].textContent, "en", { numeric: true }) * (up ? 1 : -1);
          if (x === undefined || y === undefined) return x === undefined ? 1 : -1; // no figure: last, both ways
          return (Number(x) - Number(y)) * (up ? 1 : -1);
        });
        table.tBodies[0].append(...rows);
      })
    );
  }
})();
