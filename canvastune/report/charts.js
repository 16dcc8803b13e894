// Replaces every image by an interactive plot (hover, zoom, log scale, smoothing), drawn by uPlot from
// the JSON of #curves (charts.py). Without this script, or if it fails, the images stay.
(() => {
  "use strict";
  const HEIGHT = 230;
  const FEW = 12; // lines with fewer points get markers, since the line between them is a guess
  const content = JSON.parse(document.getElementById("curves").textContent);
  const status = document.getElementById("status");
  const plots = [];
  let span = content.spans[content.start];

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  const make = (tag, attributes = {}, ...inside) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...inside); // strings become text: a run's name is never parsed as HTML
    return element;
  };

  const tick = (value) => {
    if (value === 0) return "0";
    if (Math.abs(value) < 1e-2) return value.toExponential(2).replace(/\.?0+e/, "e");
    for (const [size, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(4))}${letter}`;
    return String(Number(value.toPrecision(4)));
  };

  // Mean of the points within `span` steps around each, fewer at both ends: the smoothing of the images.
  const smooth = ([steps, values], span) => {
    let from = 0, to = 0, sum = 0;
    return [steps, steps.map((step) => {
      for (; to < steps.length && steps[to] < step + Math.ceil(span / 2); to++) sum += values[to];
      for (; steps[from] < step - Math.floor(span / 2); from++) sum -= values[from];
      return sum / (to - from);
    })];
  };

  const shownOf = (line) => (line.noisy && span > 1 ? smooth(line.means || line.raw, span) : line.raw);

  // The point of a line nearest to a step; null before its first and after its last.
  const at = ([steps, values], step) => {
    if (step < steps[0] || step > steps[steps.length - 1]) return null;
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle;
    }
    return values[step - steps[low] <= steps[high] - step ? low : high];
  };

  const logSplits = (_, __, min, max) => {
    const found = [];
    for (let power = Math.floor(Math.log10(min)); power <= Math.ceil(Math.log10(max)); power++)
      for (const factor of max / min > 1000 ? [1] : [1, 2, 5]) {
        const value = Number(`${factor}e${power}`);
        if (value >= min && value <= max) found.push(value);
      }
    if (found.length > 1) return found;
    // A narrow range: evenly spaced, as on a linear scale.
    const rough = (max - min) / 3, power = 10 ** Math.floor(Math.log10(rough));
    const pace = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
    return Array.from({ length: 4 }, (_, index) => (Math.ceil(min / pace) + index) * pace).filter((value) => value <= max);
  };

  class Plot {
    constructor(figure, chart) {
      this.chart = chart;
      this.log = chart.log;
      this.on = chart.lines.map(() => true);
      this.box = make("div", {
        class: "live-plot", tabindex: "0", role: "group", "aria-roledescription": "chart",
        "aria-label": `${chart.title}. Left and right arrow read values, plus and minus zoom, Escape shows everything.`,
      });
      this.tip = make("div", { class: "tip", hidden: "", "aria-hidden": "true" });
      this.reset = make("button", { type: "button", disabled: "", "aria-label": `Reset zoom of ${chart.title}` }, "Reset zoom");
      this.reset.addEventListener("click", () => this.zoom(...this.extent()));
      const log = make("input", { type: "checkbox", "aria-label": `Log scale of ${chart.title}` });
      log.checked = this.log;
      log.addEventListener("change", () => { this.log = log.checked; this.draw(); });
      this.box.addEventListener("keydown", (event) => this.key(event));
      this.fingers = new Map(); // on the plot, by pointer
      for (const kind of ["pointerdown", "pointermove", "pointerup", "pointercancel"])
        this.box.addEventListener(kind, (event) => { if (event.pointerType === "touch") this.touch(event); });
      this.box.addEventListener("blur", () => this.plot.setCursor({ left: -10, top: -10 }));
      const image = figure.querySelector(".still.plot");
      image.before(this.box, make("div", { class: "controls" }, make("label", {}, log, "Log scale"), this.reset));
      if (chart.lines.length > 1) figure.querySelector("figcaption").append(this.legend());
      figure.classList.add("live"); // before drawing: a hidden box has no width
      this.draw();
      new ResizeObserver(() => {
        if (this.box.clientWidth) this.plot.setSize({ width: this.box.clientWidth, height: HEIGHT });
      }).observe(this.box);
    }

    legend() {
      const group = make("div", { class: "legend toggles", role: "group", "aria-label": `Lines of ${this.chart.title}` });
      this.chart.lines.forEach((line, index) => {
        const swatch = make("i", { class: line.dashed ? "dashed" : "" });
        swatch.style.borderColor = `var(--${line.color})`;
        const button = make("button", { type: "button", "aria-pressed": "true" }, swatch, line.label);
        button.addEventListener("click", () => {
          this.on[index] = !this.on[index];
          button.setAttribute("aria-pressed", String(this.on[index]));
          this.reveal();
        });
        group.append(button);
      });
      return group;
    }

    // uPlot's series: the single steps of every line, then the bold lines, the run itself last and so on top.
    rawAt(index) { return 1 + index; }
    shownAt(index) { return 2 * this.chart.lines.length - index; }
    // Single steps are drawn for the first visible line only: for all lines they would hide each other.
    hasRaw(index) { return this.chart.lines[index].noisy && span > 1 && this.on.indexOf(true) === index; }

    data() {
      const positive = ([steps, values]) => [steps, this.log ? values.map((value) => (value > 0 ? value : null)) : values];
      this.shown = this.chart.lines.map(shownOf);
      return uPlot.join([...this.chart.lines.map((line) => line.raw), ...[...this.shown].reverse()].map(positive));
    }

    extent() {
      const steps = this.plot.data[0];
      return [steps[0], steps[steps.length - 1]];
    }

    zoomed(plot = this.plot) {
      const [from, to] = plot.series[0].idxs; // of the visible steps: known before the new y range is requested, unlike scales.x
      return from > 0 || to < plot.data[0].length - 1;
    }

    zoom(min, max) {
      const [first, last] = this.extent();
      if (max - min >= 2 || (min <= first && max >= last)) this.plot.setScale("x", { min: Math.max(min, first), max: Math.min(max, last) });
    }

    series() {
      const { lines } = this.chart;
      const raw = lines.map((line, index) => ({
        stroke: () => `${color(line.color)}59`, width: 1, points: { show: false }, spanGaps: true, show: this.hasRaw(index),
      }));
      const shown = lines.map((line, index) => ({
        stroke: () => color(line.color), width: 2, dash: line.dashed ? [6, 4] : undefined, spanGaps: true, show: this.on[index],
        points: { show: line.raw[0].length < FEW, size: 6, fill: () => color(line.color) },
      }));
      return [{}, ...raw, ...shown.reverse()];
    }

    axes() {
      const plain = {
        stroke: () => color("soft"), font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif", ticks: { show: false },
      };
      const incrs = Array.from({ length: 27 }, (_, index) => [1, 2, 5][index % 3] * 10 ** Math.floor(index / 3));
      const y = {
        ...plain, size: 50, label: this.chart.unit || undefined, labelSize: 18, grid: { stroke: () => color("line"), width: 1 },
        values: (_, values) => values.map(tick), filter: (_, values) => values, space: 36,
      };
      if (this.log) y.splits = logSplits;
      return [{ ...plain, incrs, space: 56, size: 26, label: this.chart.across, labelSize: 18, grid: { show: false } }, y];
    }

    range(plot, min, max) {
      if (min == null) return this.log ? [1, 10] : [0, 1];
      if (this.log) return [min / 1.2, max * 1.2];
      const room = 0.08 * (max - min || Math.abs(max) || 1);
      return min >= 0 && !this.zoomed(plot) ? [0, max + 0.08 * max || 1] : [min - room, max + room];
    }

    draw() {
      const kept = this.plot && this.zoomed() ? { ...this.plot.scales.x } : null;
      this.plot?.destroy();
      this.plot = new uPlot({
        width: this.box.clientWidth || 320, height: HEIGHT, legend: { show: false }, padding: [8, 16, 0, 0],
        scales: {
          x: { time: false, range: (_, min, max) => (min === max ? [min - 1, max + 1] : [min, max]) },
          y: { distr: this.log ? 3 : 1, range: (plot, min, max) => this.range(plot, min, max) },
        },
        cursor: { y: false, drag: { x: true, y: false, dist: 5 }, hover: { prox: 40, skip: [undefined, null] }, points: { size: 7 } },
        series: this.series(), axes: this.axes(),
        hooks: {
          drawAxes: [(plot) => this.mark(plot)],
          setCursor: [(plot) => this.read(plot)],
          setScale: [(plot, key) => { if (key === "x") this.reset.disabled = !this.zoomed(plot); }],
        },
      }, this.data(), this.box);
      this.plot.over.append(this.tip);
      if (kept) this.zoom(kept.min, kept.max);
    }

    reveal() {
      this.on.forEach((on, index) => {
        this.plot.setSeries(this.rawAt(index), { show: this.hasRaw(index) });
        this.plot.setSeries(this.shownAt(index), { show: on });
      });
    }

    smoothed() {
      const { min, max } = this.plot.scales.x;
      this.plot.setData(this.data(), false);
      this.plot.setScale("x", { min, max }); // fits the y range again
      this.reveal();
    }

    mark(plot) {
      const { ctx, bbox } = plot;
      ctx.save();
      ctx.strokeStyle = color("soft");
      ctx.lineWidth = devicePixelRatio;
      ctx.setLineDash([devicePixelRatio, 3 * devicePixelRatio]);
      for (const step of this.chart.across === "step" ? content.events : []) {
        const x = plot.valToPos(step, "x", true);
        if (x < bbox.left || x > bbox.left + bbox.width) continue;
        ctx.beginPath();
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
      }
      ctx.restore();
    }

    // Show the values at the cursor in the tooltip; return them as a sentence.
    read(plot) {
      const { idx, left } = plot.cursor;
      this.tip.hidden = idx == null || left < 0;
      if (this.tip.hidden) return "";
      const step = plot.data[0][idx];
      const rows = [make("b", {}, `${this.chart.across} ${step.toLocaleString("en")}`)];
      this.chart.lines.forEach((line, index) => {
        const value = this.on[index] ? at(this.shown[index], step) : null;
        if (value == null) return;
        const swatch = make("i", { class: line.dashed ? "dashed" : "" });
        swatch.style.borderColor = `var(--${line.color})`;
        const single = this.hasRaw(index) ? ` (single step ${tick(at(line.raw, step))})` : "";
        const label = this.chart.lines.length > 1 ? `${line.label}: ` : "";
        rows.push(make("span", {}, swatch, `${label}${tick(value)}${single}`));
      });
      this.tip.replaceChildren(...rows);
      const beyond = left > plot.over.clientWidth / 2;
      this.tip.style.left = beyond ? "auto" : `${left + 12}px`;
      this.tip.style.right = beyond ? `${plot.over.clientWidth - left + 12}px` : "auto";
      return rows.map((row) => row.textContent).join(", ");
    }

    // One finger reads values, two fingers zoom around the step between them. Vertical moves scroll the page
    // (touch-action).
    touch(event) {
      const { plot, fingers } = this;
      const place = plot.over.getBoundingClientRect();
      const at = [event.clientX - place.left, event.clientY - place.top];
      if (event.type === "pointerdown" && plot.over.contains(event.target)) fingers.set(event.pointerId, at);
      else if (event.type === "pointermove" && fingers.has(event.pointerId)) fingers.set(event.pointerId, at);
      else fingers.delete(event.pointerId);
      const [one, other] = fingers.values();
      if (!other) {
        this.pinch = null;
        if (one) plot.setCursor({ left: Math.min(Math.max(one[0], 0), place.width), top: one[1] });
        return;
      }
      const middle = (one[0] + other[0]) / 2, apart = Math.max(20, Math.hypot(one[0] - other[0], one[1] - other[1]));
      const { min, max } = plot.scales.x;
      this.pinch ??= { step: min + (middle / place.width) * (max - min), shown: (max - min) * apart };
      const shown = this.pinch.shown / apart, from = this.pinch.step - (middle / place.width) * shown;
      this.zoom(from, from + shown);
    }

    key(event) {
      const { plot } = this;
      const { min, max } = plot.scales.x;
      const steps = plot.data[0];
      const held = plot.cursor.left >= 0 ? plot.cursor.idx : null;
      const middle = held == null ? (min + max) / 2 : steps[held];
      const quarter = (max - min) / 4;
      const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 };
      if (event.key in moves) {
        const inside = [...steps.keys()].filter((index) => steps[index] >= min && steps[index] <= max);
        const wanted = held == null ? inside[0] : held + moves[event.key];
        const index = Math.min(inside[inside.length - 1], Math.max(inside[0], wanted));
        plot.setCursor({ left: plot.valToPos(steps[index], "x"), top: plot.over.clientHeight / 2 });
        status.textContent = this.read(plot);
      } else if (event.key === "+" || event.key === "=") this.zoom(middle - quarter, middle + quarter);
      else if (event.key === "-") this.zoom(min - 2 * quarter, max + 2 * quarter);
      else if (event.key === "Escape") this.zoom(...this.extent());
      else return;
      event.preventDefault();
    }
  }

  for (const chart of content.charts) plots.push(new Plot(document.querySelector(`[data-chart="${chart.name}"]`), chart));

  const slider = document.getElementById("smoothing");
  const showSpan = () => {
    const text = span > 1 ? `${span} steps` : "off";
    slider.setAttribute("aria-valuetext", text);
    slider.nextElementSibling.textContent = text;
  };
  slider.max = content.spans.length - 1;
  slider.value = content.start;
  slider.addEventListener("input", () => {
    span = content.spans[slider.value];
    showSpan();
    plots.forEach((plot) => plot.smoothed());
  });
  showSpan();
  slider.closest("[hidden]").hidden = content.spans.length < 2;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach((plot) => plot.draw()));
})();
