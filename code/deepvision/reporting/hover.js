// Values under the pointer in figures: the nearest point of each curve, or a cell of a matrix.
"use strict";
for (const figure of document.querySelectorAll("figure.hover")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const [left, top, width, height] = data.box; // of the axes, as shares of the figure
  const frame = figure.querySelector(".frame"), mark = figure.querySelector(".mark");
  const out = figure.querySelector("output");
  const counts = new Map((data.cells || []).map(([i, j, n]) => [`${i},${j}`, n]));
  const at = { x: 0, y: 0 }; // a share of the axes for curves, a cell for a matrix

  function place(x, y, w, h) {
    mark.hidden = false;
    Object.assign(mark.style, { left: `${100 * (left + x * width)}%`, top: `${100 * (top + y * height)}%`,
      width: `${100 * w * width}%`, height: `${100 * h * height}%` });
  }
  function showCurves() {
    const [low, high] = data.xlim, x = low + at.x * (high - low);
    const nearest = data.series.map(({ name, points }) => [name,
      points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a))]);
    const values = nearest.map(([name, [px, py]]) => `${name}: ${py}${data.unit} (${data.x} ${px})`);
    place(at.x, 0, 0, 1);
    out.textContent = values.join("\n");
  }
  function showCell() {
    const n = data.names.length, count = counts.get(`${at.y},${at.x}`) || 0, total = data.totals[at.y];
    place(at.x / n, at.y / n, 1 / n, 1 / n);
    out.textContent = `true: ${data.names[at.y]}\npredicted: ${data.names[at.x]}\n` +
      `${count} of ${total} images (${(100 * count / total).toFixed(1)} %)`;
  }
  const matrix = data.kind === "matrix", last = matrix ? data.names.length - 1 : 1;
  function move(x, y) {
    at.x = Math.min(Math.max(x, 0), last);
    at.y = Math.min(Math.max(y, 0), last);
    (matrix ? showCell : showCurves)();
  }
  function point(event) {
    const box = frame.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width - left) / width;
    const y = ((event.clientY - box.top) / box.height - top) / height;
    matrix ? move(Math.floor(x * (last + 1)), Math.floor(y * (last + 1))) : move(x, y);
  }
  frame.addEventListener("pointermove", point);
  frame.addEventListener("pointerdown", point);
  frame.addEventListener("keydown", (event) => {
    const step = matrix ? 1 : 0.02;
    const by = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
    if (!by) return;
    event.preventDefault();
    move(at.x + by[0], at.y + by[1]);
  });
}
