// One step in the reader's browser: noise of a seed, one network evaluation, an image. Built by .ci/live.
"use strict";
(() => {
const here = new URL(".", document.currentScript.src);
const root = document.getElementById("live");
const RUNTIME = ["ort.wasm.min.js", "ort-wasm-simd-threaded.js", "ort-wasm-simd-threaded.wasm.gz"];
const STUDENT = ["generator.onnx"], TEACHER = ["teacher.onnx", "decoder.onnx"];
const state = {about: null, ort: null, sessions: {}, running: false, again: false};

// ---- noise: the same numbers as drift_rae.parts.live.browser_noise

function mulberry32(seed) { // uniform numbers in [0, 1) from a 32-bit state
  let a = seed >>> 0;
  return () => {
    a = (a + 0x6D2B79F5) >>> 0;
    let t = Math.imul(a ^ (a >>> 15), 1 | a);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

function noiseOf(seed, n) { // n standard normal numbers (Box-Muller)
  const uniform = mulberry32(seed), out = new Float64Array(n);
  for (let i = 0; i < n; i += 2) {
    const r = Math.sqrt(-2 * Math.log(1 - uniform())), angle = 2 * Math.PI * uniform();
    out[i] = r * Math.cos(angle);
    if (i + 1 < n) out[i + 1] = r * Math.sin(angle);
  }
  return out;
}

function between(a, b, s) { // on the quarter circle from a to b: the variance stays 1
  const ca = Math.cos(Math.PI / 2 * s), cb = Math.sin(Math.PI / 2 * s);
  return Float32Array.from(a, (x, i) => ca * x + cb * b[i]);
}

// ---- files

const megabytes = names => (names.reduce((sum, n) => sum + state.about.files[n], 0) / 1e6).toFixed(1) + " MB";

async function bytes(name) { // of a file beside this script; a .gz file is unpacked unless the server did so
  const answer = await fetch(new URL(name, here));
  if (!answer.ok) throw new Error(`${name}: the server answers ${answer.status}`);
  const data = new Uint8Array(await answer.arrayBuffer());
  if (!name.endsWith(".gz") || data[0] !== 0x1f || data[1] !== 0x8b) return data;
  const unpacked = new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(unpacked).arrayBuffer());
}

async function loadRuntime() { // onnxruntime-web, one thread, on the processor
  if (state.ort) return;
  const ort = await import(new URL(RUNTIME[0], here).href);
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = {mjs: new URL(RUNTIME[1], here).href};
  ort.env.wasm.wasmBinary = (await bytes(RUNTIME[2])).buffer;
  state.ort = ort;
}

async function loadModels(names) {
  await loadRuntime();
  for (const name of names)
    state.sessions[name] ??= await state.ort.InferenceSession.create(await bytes(name), {executionProviders: ["wasm"]});
}

// ---- networks

const tensor = (data, shape) => new state.ort.Tensor("float32", data, shape);
const integers = list => new state.ort.Tensor("int64", BigInt64Array.from(list, BigInt), [list.length]);

async function generate(noise, labels) { // the one-step generator: images of the same noise, one per label
  const {latent} = state.about, all = new Float32Array(noise.length * labels.length);
  labels.forEach((_, i) => all.set(noise, i * noise.length));
  const inputs = {noise: tensor(all, [labels.length, ...latent]), label: integers(labels)};
  return (await state.sessions["generator.onnx"].run(inputs)).images;
}

async function follow(noise, label) { // the teacher's path by Euler's method: images of all its points
  const {latent, times} = state.about, n = noise.length;
  const path = new Float32Array(n * times.length);
  let x = noise;
  path.set(x);
  for (let i = 0; i + 1 < times.length; i++) {
    const inputs = {x: tensor(x, [1, ...latent]), t: tensor(Float32Array.of(times[i]), [1]), label: integers([label])};
    const v = (await state.sessions["teacher.onnx"].run(inputs)).velocity.data;
    const step = Math.fround(times[i + 1] - times[i]);
    x = x.map((value, k) => value + step * v[k]);
    path.set(x, n * (i + 1));
  }
  return (await state.sessions["decoder.onnx"].run({latents: tensor(path, [times.length, ...latent])})).images;
}

function paint(canvas, images, i) { // image number i of a tensor [N, 3, H, W] in [0, 1]
  const [, , h, w] = images.dims, context = canvas.getContext("2d"), size = h * w;
  canvas.width = w; canvas.height = h;
  const pixels = context.createImageData(w, h);
  for (let k = 0; k < size; k++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * k + c] = Math.round(255 * images.data[(3 * i + c) * size + k]);
    pixels.data[4 * k + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
}

// ---- the page

const $ = name => root.querySelector(`[data-live="${name}"]`);
const say = text => { $("status").textContent = text; };
const seedOf = name => Math.min(Math.max(Math.trunc(Number($(name).value)) || 0, 0), 4294967295);
const chosen = () => Number(root.querySelector('input[name="live-class"]:checked').value);

function build() {
  const classes = Array.from({length: state.about.classes}, (_, i) => `<label class="live-choice">
    <input type="radio" name="live-class" value="${i}" ${i === 3 ? "checked" : ""}>
    <canvas width="16" height="16" aria-hidden="true"></canvas><span>${i}</span></label>`).join("");
  const points = state.about.times.map((t, i) => `<li><canvas width="16" height="16" role="img"
    aria-label="The teacher's state after ${i} steps"></canvas><span>${i ? i : "noise"}</span></li>`).join("");
  root.innerHTML = `
  <p data-live="status" role="status" aria-live="polite">Nothing is loaded yet.</p>
  <button type="button" data-live="load">Load the generator (${megabytes([...RUNTIME, ...STUDENT])})</button>
  <div data-live="app" hidden>
    <div class="live-main">
      <figure><canvas data-live="image" width="16" height="16" role="img" aria-label="The generated image"></canvas>
        <figcaption data-live="caption"></figcaption></figure>
      <div class="live-controls">
        <fieldset><legend>Class (each picture is made of the same noise)</legend>
          <div class="live-classes">${classes}</div></fieldset>
        <fieldset><legend>Noise</legend>
          <div class="live-seeds">
            <label>First seed <input type="number" data-live="first" min="0" max="4294967295" step="1" value="0"></label>
            <label>Second seed <input type="number" data-live="second" min="0" max="4294967295" step="1" value="1"></label>
            <button type="button" data-live="draw">Draw new noise</button></div>
          <label class="live-slider">From the first noise to the second
            <input type="range" data-live="mix" min="0" max="100" step="1" value="0"></label>
          <output data-live="share">0 % of the way</output></fieldset>
      </div>
    </div>
    <div class="live-teacher">
      <button type="button" data-live="teach">Show the teacher's path (${megabytes(TEACHER)} more)</button>
      <figure data-live="path" hidden><figcaption data-live="walk"></figcaption><ol>${points}</ol></figure>
    </div>
  </div>`;
  $("load").addEventListener("click", () => guarded(start));
  $("teach").addEventListener("click", () => guarded(teach));
  $("draw").addEventListener("click", draw);
  for (const e of root.querySelectorAll("input")) e.addEventListener("input", update);
}

function draw() { // two new seeds, the slider back at the first
  const [first, second] = crypto.getRandomValues(new Uint16Array(2));
  $("first").value = first; $("second").value = second; $("mix").value = 0;
  update();
}

async function guarded(action) { // an error becomes a message on the page
  root.dataset.busy = "yes";
  try { await action(); } catch (error) { say(`This did not work: ${error.message ?? error}`); }
  delete root.dataset.busy;
}

async function start() {
  $("load").disabled = true;
  say(`Loading ${megabytes([...RUNTIME, ...STUDENT])} ...`);
  try { await loadModels(STUDENT); } catch (error) { $("load").disabled = false; throw error; }
  $("load").hidden = true; $("app").hidden = false;
  await show();
}

async function teach() {
  $("teach").disabled = true;
  try { await loadModels(TEACHER); } catch (error) { $("teach").disabled = false; throw error; }
  $("teach").hidden = true; $("path").hidden = false;
  await show();
}

async function update() { // one drawing at a time; what changed meanwhile is drawn after it
  if (state.running) { state.again = true; return; }
  state.running = true;
  await guarded(async () => { do { state.again = false; await show(); } while (state.again); });
  state.running = false;
}

async function show() {
  const n = state.about.latent.reduce((a, b) => a * b), mix = Number($("mix").value) / 100, label = chosen();
  const noise = between(noiseOf(seedOf("first"), n), noiseOf(seedOf("second"), n), mix);
  const labels = Array.from({length: state.about.classes}, (_, i) => i), began = performance.now();
  const images = await generate(noise, labels), took = performance.now() - began;
  root.querySelectorAll(".live-classes canvas").forEach((canvas, i) => paint(canvas, images, i));
  paint($("image"), images, label);
  $("image").setAttribute("aria-label", `Generated image of class ${label}`);
  $("caption").textContent = `Class ${label}, one evaluation of the network`;
  $("share").textContent = `${Math.round(100 * mix)} % of the way`;
  say(`${labels.length} images in ${took.toFixed(0)} ms, one evaluation each.`);
  if (!$("path").hidden) await showPath(noise, label);
}

async function showPath(noise, label) {
  const began = performance.now(), images = await follow(noise, label), took = performance.now() - began;
  $("path").querySelectorAll("canvas").forEach((canvas, i) => paint(canvas, images, i));
  $("walk").textContent = `The teacher, same noise and class: ${state.about.times.length - 1} evaluations in ${took.toFixed(0)} ms`;
}

async function begin() {
  if (location.protocol === "file:") {
    root.textContent = "This part runs from a web server only (a browser loads no networks from file addresses): " +
      "open the page on the site, or run python -m http.server in the site's folder.";
    return;
  }
  const answer = await fetch(new URL("models.json", here));
  if (!answer.ok) { root.textContent = "The networks are missing on this server: .ci/live makes them."; return; }
  state.about = await answer.json();
  build();
  root.dataset.ready = "yes";
}

if (root) begin().catch(error => { root.textContent = `This did not work: ${error.message}`; });
})();
