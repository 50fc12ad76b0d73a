// Draws an action program that the library exported (SCHEDULES, in schedules.js), and counts versions and gaps in it.
// A version is the number of U of a stage so far; the gap of a micro-batch the number of U between its F and its B.
(() => {
  const COLOURS = ["#35608f", "#9a5200", "#37753a", "#84508c", "#b8373d", "#2d7476", "#76543f", "#5f5a57"];
  const UNIT = 34, ROW = 46, BOX = 34, LEFT = 56, LASTS = { F: 1, B: 2, U: 0 };
  const svg = (tag, attributes, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };

  // Of each stage its actions; F and B with the version they find, and of F the gap to its B.
  function read(program) {
    return program.spans.map((line) => {
      let version = 0;
      const forwards = {};
      return line.split(" ").map((token) => {
        const [, kind, number, start] = token.match(/^(\w)(\d+)@(.*)$/);
        const action = { kind, number: +number, start: +start, version };
        if (kind === "F") forwards[number] = action;
        if (kind === "B") action.gap = forwards[number].gap = version - forwards[number].version;
        if (kind === "U") action.version = ++version;
        return action;
      });
    });
  }

  // The weights of an action in symbols and in words.
  function weights(action, k, stages, method, told) {
    const forward = stages[k].find((a) => a.kind === "F" && a.number === action.number);
    const number = (what, otherwise) => (told[what] ? (told[what].length ? told[what][k][action.number] : forward.gap) : otherwise);
    const ofForward = forward.version + forward.gap - number("gap", forward.gap);
    if (action.kind === "B" && method.stashes)
      return { ...weights(forward, k, stages, method, told), words: "the weights that its F used, kept" };
    const ahead = number(action.kind === "F" ? "forward" : "backward", 0);
    const base = action.kind === "F" ? ofForward : action.version;
    if (ahead) return { symbol: `Ŵ${base + ahead}`, words: `version ${base + ahead} as predicted from version ${base}` };
    return { symbol: `W${base}`, words: base === action.version ? "the latest weights" : `version ${base}, kept` };
  }

  function draw(viewer, choice) {
    const method = SCHEDULES.methods[choice.method];
    const program = SCHEDULES.programs[`${method.order}/${choice.D}/${choice.M}/${choice.slack}`];
    const picture = viewer.querySelector(".picture"), told = viewer.querySelector(".told"), summary = viewer.querySelector(".summary");
    picture.replaceChildren();
    told.textContent = "";
    if (!program || !program.copies[choice.method]) {
      summary.textContent = !program
        ? "A method that flushes has no slack: all micro-batches of a mini-batch and no others are in flight."
        : "This method is not defined here: it needs more micro-batches per mini-batch, or no slack.";
      return;
    }
    const stages = read(program), special = program.weights[choice.method];
    const last = Math.max(...stages.flat().map((a) => a.start + LASTS[a.kind]));
    const width = LEFT + UNIT * last + 12, height = ROW * choice.D + 8;
    const paper = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${choice.method}: ${choice.D} stages` });
    const cells = [];
    stages.forEach((actions, k) => {
      paper.append(svg("text", { x: 0, y: ROW * k + 26, "font-size": 12 }, `stage ${k}`));
      for (const action of actions) {
        const cell = action.kind === "U" ? update(action, k) : box(action, k, weights(action, k, stages, method, special), choice.M);
        cells.push({ cell, action, k });
        paper.append(cell);
        if (action.kind !== "U") {
          const choose = () => select(paper, cells, action, told, k, stages, method, special, choice);
          cell.addEventListener("click", choose);
          cell.addEventListener("focus", choose);
          cell.addEventListener("mouseenter", choose);
        }
      }
    });
    picture.append(paper);
    summary.replaceChildren(...describe(stages, program, method, choice));
    told.textContent = "Point at a micro-batch, or tap it, to follow it through the stages.";
  }

  function update(action, k) {
    const x = LEFT + UNIT * action.start, y = ROW * k + 4 + BOX;
    return svg("g", { class: "update" }, svg("path", { d: `M${x - 5} ${y + 7}l5 -7l5 7z` }), svg("title", {}, `stage ${k}: update, now W${action.version}`));
  }

  function box(action, k, used, m) {
    const x = LEFT + UNIT * action.start, y = ROW * k + 4, w = UNIT * LASTS[action.kind] - 1, strong = action.kind === "B";
    const text = (dy, size, content) =>
      svg("text", { x: x + w / 2, y: y + dy, "text-anchor": "middle", "font-size": size, class: strong ? "strong" : "" }, content);
    const colour = COLOURS[Math.floor(action.number / m) % COLOURS.length];
    return svg(
      "g", { tabindex: -1, "data-k": k, "data-action": action.kind + action.number },
      svg("rect", { x, y, width: w, height: BOX, rx: 3, fill: colour, "fill-opacity": strong ? 1 : 0.3 }),
      text(15, 12, `${action.kind}${action.number}`), text(29, 10, used.symbol),
    );
  }

  function select(paper, cells, action, told, k, stages, method, special, choice) {
    const forward = stages[k].find((a) => a.kind === "F" && a.number === action.number);
    const backward = stages[k].find((a) => a.kind === "B" && a.number === action.number);
    paper.classList.add("chosen");
    for (const one of cells) {
      const crossed = one.action.kind === "U" && one.k === k && one.action.version > forward.version && one.action.version <= backward.version;
      one.cell.classList.toggle("crossed", crossed);
      one.cell.classList.toggle("same", one.action.kind !== "U" && one.action.number === action.number);
    }
    const words = (a) => { const w = weights(a, k, stages, method, special); return `${w.symbol} (${w.words})`; };
    const missed = forward.gap === 1 ? "1 update (red)" : `${forward.gap} updates${forward.gap ? " (red)" : ""}`;
    told.textContent = `Micro-batch ${action.number} (mini-batch ${Math.floor(action.number / choice.M)}) on stage ${k}: F on ${words(forward)}, `
      + `B on ${words(backward)}. Version gap: ${missed} between its F and its B.`;
  }

  // In the steady state, or as near to it as the drawing gets: the last mini-batch that was fed.
  function describe(stages, program, method, choice) {
    const fed = stages[0].filter((a) => a.kind === "F" && a.number % choice.M === 0).map((a) => a.start);
    const period = fed.at(-1) - fed.at(-2), idle = 1 - (3 * choice.M) / period;
    const n = fed.length - 1, gaps = stages.map((actions) => actions.filter((a) => a.kind === "F" && Math.floor(a.number / choice.M) === n).map((a) => a.gap));
    const shown = gaps.map((g) => (Math.min(...g) === Math.max(...g) ? `${g[0]}` : `${Math.min(...g)}–${Math.max(...g)}`)).join(", ");
    const line = (text) => { const p = document.createElement("div"); p.textContent = text; return p; };
    return [
      line(method.about[0].toUpperCase() + method.about.slice(1) + "."),
      line(`A mini-batch every ${period} units of time (F takes 1, B 2), so each stage is idle for ${Math.round(100 * idle)} %.`),
      line(`Version gap of stages 0 to ${choice.D - 1}: ${shown}. Copies of the weights: ${program.copies[choice.method].join(", ")}.`),
    ];
  }

  function start(viewer) {
    const choice = { method: "pipeoptim", D: 4, M: 1, slack: 0 };
    const offered = { method: Object.keys(SCHEDULES.methods), D: SCHEDULES.depths, M: SCHEDULES.microbatches, slack: SCHEDULES.slack };
    const names = { method: "Method", D: "Stages D", M: "Micro-batches M", slack: "Slack" };
    const fields = document.createElement("fieldset");
    for (const [what, values] of Object.entries(offered)) {
      const label = document.createElement("label"), select = document.createElement("select");
      select.name = what;
      for (const value of values) select.add(new Option(value, value, false, value === choice[what]));
      select.addEventListener("change", () => {
        choice[what] = what === "method" ? select.value : +select.value;
        draw(viewer, choice);
      });
      label.append(names[what], select);
      fields.append(label);
    }
    const part = (name) => { const made = document.createElement("div"); made.className = name; return made; };
    viewer.replaceChildren(fields, part("picture"), part("told"), part("summary"));
    viewer.querySelector(".told").setAttribute("aria-live", "polite");
    draw(viewer, choice);
  }

  document.querySelectorAll(".schedule-viewer").forEach(start);
})();
