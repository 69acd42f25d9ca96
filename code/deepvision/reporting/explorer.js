// The explorer of attacks. A point is a number: -1 is the clean image, then ε by ε and step count by
// step count, last the assignment's attack. Attacked = clean + stored difference, modulo 256.
"use strict";
const S = 128; // side of an image in pixels

async function pixelsOf(address) { // the RGBA bytes of a PNG
  const image = new Image();
  image.src = address;
  await image.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.width, image.height).data;
}

async function explore(root) {
  const data = JSON.parse(root.querySelector("script").textContent);
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  const { epsilons, steps, images, accuracy } = data;
  for (const image of images) [image.rgba, image.change] = await Promise.all([pixelsOf(image.clean), pixelsOf(image.sheet)]);
  let chosen = images[0];
  const sliders = { epsilon: part("epsilon"), steps: part("steps") }, assignment = part("default");

  function draw(name, bytes) {
    part(name).getContext("2d").putImageData(new ImageData(bytes, S), 0, 0);
  }
  function bars(name, top) {
    part(name).replaceChildren(...top.map(([label, p]) => {
      const item = document.createElement("li"), bar = document.createElement("i"), right = label === chosen.label;
      bar.style.width = `${100 * p}%`;
      item.classList.toggle("true", right);
      item.append(`${label}${right ? " (true class)" : ""} ${(100 * p).toFixed(1)} %`, bar);
      return item;
    }));
  }
  function show() {
    const e = +sliders.epsilon.value, s = +sliders.steps.value, last = (epsilons.length - 1) * steps.length;
    const point = assignment.checked ? last : e ? (e - 1) * steps.length + s : -1;
    const attacked = chosen.rgba.slice(), difference = chosen.rgba.slice();
    let largest = 1;
    for (let i = 0; point >= 0 && i < attacked.length; i++) {
      if (i % 4 < 3) attacked[i] = (chosen.rgba[i] + chosen.change[point * S * S * 4 + i]) & 255;
      largest = Math.max(largest, Math.abs(attacked[i] - chosen.rgba[i]));
    }
    const factor = Math.floor(127 / largest);
    for (let i = 0; i < difference.length; i++) if (i % 4 < 3) difference[i] = 128 + factor * (attacked[i] - chosen.rgba[i]);
    draw("clean", chosen.rgba); draw("attacked", attacked); draw("difference", difference);
    part("factor").textContent = factor;
    part("map").src = chosen.maps[part("maps").value];
    part("map").alt = `${part("maps").value} of the clean image`;
    part("epsilon-value").textContent = `= ${epsilons[e]} of 255 levels`;
    part("steps-value").textContent = `= ${steps[s]}`;
    sliders.epsilon.setAttribute("aria-valuetext", epsilons[e]); sliders.steps.setAttribute("aria-valuetext", steps[s]);
    const after = chosen.top[point + 1], [label, p] = after[0], known = assignment.checked
      ? [accuracy.default, accuracy.default_images] : [accuracy.grid[e][s], accuracy.images];
    bars("before", chosen.top[0]); bars("after", after);
    part("status").textContent = `${label === chosen.label ? "Holds" : "Fooled"}: predicted ${label}, ${(100 * p).toFixed(1)} %. ` +
      `Accuracy under this attack: ${known[0].toFixed(1)} % of ${known[1]} images.`;
    for (const b of part("heat").querySelectorAll("button"))
      b.setAttribute("aria-pressed", !assignment.checked && +b.dataset.e === e && +b.dataset.s === s);
  }
  function fill() { // thumbnails, sliders, heat map
    images.forEach((image, n) => {
      const label = document.createElement("label");
      label.innerHTML = `<input type="radio" name="image"><img alt="">`;
      label.querySelector("img").src = image.clean;
      label.append(`${image.label}: ${image.held ? "holds" : "falls"}`);
      Object.assign(label.querySelector("input"), { checked: !n, onchange: () => { chosen = image; show(); } });
      root.querySelector(".choice").append(label);
    });
    Object.assign(sliders.epsilon, { max: epsilons.length - 1, value: 3 });
    Object.assign(sliders.steps, { max: steps.length - 1, value: 2 });
    part("budget").textContent = data.budget;
    part("maps").replaceChildren(...Object.keys(chosen.maps).map((name) => new Option(name)));
    const heat = part("heat"), cell = (e, s) => `<td><button type="button" data-e="${e}" data-s="${s}" style="--share:${accuracy.grid[e][s]}"
      aria-label="epsilon ${epsilons[e]}, ${steps[s]} steps">${accuracy.grid[e][s].toFixed(0)}</button></td>`;
    heat.caption.textContent = `Accuracy in % of ${accuracy.images} images under untargeted PGD: ε by steps`;
    heat.tHead.innerHTML = `<tr><th scope="col">ε \\ steps</th>${steps.map((s) => `<th scope="col">${s}</th>`).join("")}</tr>`;
    heat.tBodies[0].innerHTML = epsilons.map((v, e) => `<tr><th scope="row">${v}</th>${steps.map((_, s) => cell(e, s)).join("")}</tr>`).join("");
  }
  fill();
  for (const control of [assignment, part("maps")]) control.addEventListener("input", show);
  for (const slider of Object.values(sliders)) slider.addEventListener("input", () => { assignment.checked = false; show(); });
  part("heat").addEventListener("click", ({ target: { dataset } }) => {
    if (!dataset.e) return;
    [sliders.epsilon.value, sliders.steps.value, assignment.checked] = [dataset.e, dataset.s, false];
    show();
  });
  show();
  root.dataset.ready = "";
}

for (const root of document.querySelectorAll(".explorer")) explore(root);
