"use strict";
(() => {
  const { series, range, last } = JSON.parse(document.getElementById("data").textContent);
  const charts = ["train", "validation"];
  const chips = [...document.querySelectorAll(".chip")];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)");
  const hidden = new Set();

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const faded = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");
  const axis = () => document.querySelector("input[name=axis]:checked")?.value ?? "steps";

  // A band is two invisible lines with the space between them filled; the mean lies above.
  function traces(chart) {
    const overTime = axis() === "seconds";
    const label = overTime ? "%{x:.2f} s" : "step %{x}";
    const out = [];
    for (const s of series) {
      if (hidden.has(s.name) || (overTime && s.seconds === null)) continue;
      const x = (band) => (overTime ? band.x.map((step) => step * s.seconds) : band.x);
      const colour = css(s.colour);
      const line = { color: colour, width: 2, dash: s.dash };
      const hover = `<b>${s.name}</b><br>${label}: %{y:.4f}<extra></extra>`;
      const band = s[chart];
      if (chart === "train" && s.faint) {
        out.push({ x: x(s.faint), y: s.faint.mean, mode: "lines", line: { color: faded(colour, 0.3), width: 1 }, hoverinfo: "skip" });
      }
      if (band.x.length && band.low.some((low, i) => low !== band.high[i])) {
        const edge = { mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
        out.push({ ...edge, x: x(band), y: band.low });
        out.push({ ...edge, x: x(band), y: band.high, fill: "tonexty", fillcolor: faded(colour, 0.16) });
      }
      const few = band.x.length <= 20;
      out.push({ x: x(band), y: band.mean, mode: few ? "lines+markers" : "lines", marker: { size: 5, color: colour }, line, hovertemplate: hover });
      if (chart === "train") {
        for (const lost of s.lost) {
          const marker = { symbol: lost.x.map((_, i) => (i === lost.x.length - 1 ? "x" : "circle")), size: lost.x.map((_, i) => (i === lost.x.length - 1 ? 9 : 0.1)), color: colour };
          out.push({ x: x(lost), y: lost.mean, mode: "lines+markers", marker, line: { ...line, width: 1 }, hovertemplate: hover.replace("</b>", " (diverged)</b>") });
        }
      }
    }
    return out;
  }

  function layout() {
    const lines = { gridcolor: css("--line"), linecolor: css("--line"), zeroline: false, automargin: true, ticks: "" };
    return {
      autosize: true,
      margin: { l: 44, r: 8, t: 8, b: 40 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: css("--quiet") },
      xaxis: { ...lines, title: { text: axis() === "seconds" ? "training time, s" : "step (mini-batches)" }, range: axis() === "seconds" ? undefined : [0, last * 1.02], rangemode: "tozero" },
      yaxis: { ...lines, range: range ?? undefined, title: { text: "" } },
      hoverlabel: { bgcolor: css("--paper"), bordercolor: css("--line"), font: { color: css("--ink"), size: 13 } },
      hovermode: "closest",
      dragmode: coarse.matches ? false : "zoom", // a finger on the chart scrolls the page
      showlegend: false,
    };
  }

  const config = { displaylogo: false, displayModeBar: false, responsive: true, showTips: false, doubleClick: "reset+autosize" };

  function draw() {
    for (const id of charts) Plotly.react(id, traces(id), layout(), config);
    for (const chip of chips) chip.setAttribute("aria-pressed", String(!hidden.has(chip.dataset.method)));
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
  for (const input of document.querySelectorAll("input[name=axis]")) input.addEventListener("change", draw);
  dark.addEventListener("change", draw);
  draw();

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
          if (x === undefined && y === undefined) return a.cells[column].textContent.localeCompare(b.cells[column].textContent) * (up ? 1 : -1);
          if (x === undefined || y === undefined) return x === undefined ? 1 : -1; // no figure: last, both ways
          return (Number(x) - Number(y)) * (up ? 1 : -1);
        });
        table.tBodies[0].append(...rows);
      })
    );
  }
})();
