// Sends inputs (a recording, a file, text, or a mixture of two) to /search and /generate and shows the responses.

const $ = (id) => document.getElementById(id);
const CLIENT = Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
const PLURAL = { text: "Texts", image: "Images", audio: "Clips" };
const TRIES = 30;

const state = { bridges: [], limits: {}, inputs: [], adding: false, seed: 0, work: null, searching: null, held: [] };

// ---- bridges and models

async function start() {
  $("status").textContent = "Loading the bridge…";
  try {
    const here = await ask("/bridge");
    state.bridges = here.bridges;
    state.limits = here.limits;
    fill($("bridge"), here.bridges.filter((bridge) => !bridge.problem).map((bridge) => bridge.name));
    fill($("model"), here.models);
    $("status").textContent = here.models.length ? "" : "No text-to-image model is installed. Search still works.";
    hint();
    if (here.models.length) showPreparation();
  } catch (error) {
    $("status").textContent = "";
    showError(error);
  }
}

const PREPARING = "Preparing images: ";
const preparation = ({ what, done, of }) => `${PREPARING}${what}${of > 1 ? ` ${done} of ${of}` : "…"}`;

// What images wait for after the server's start, while nothing is being drawn.
async function showPreparation() {
  for (;;) {
    const { preparing } = await ask("/healthz").catch(() => ({}));
    const says = $("status").textContent;
    if (!state.work && (says === "" || says.startsWith(PREPARING))) $("status").textContent = preparing ? preparation(preparing) : "";
    if (!preparing) return;
    await new Promise((done) => setTimeout(done, 1000));
  }
}

function fill(select, names) {
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  select.disabled = names.length < 2;
}

const bridge = () => state.bridges.find((found) => found.name === $("bridge").value) || { modalities: {} };

function hint() {
  const can = Object.keys(bridge().modalities);
  const names = can.map((modality) => ({ image: "images" })[modality] || modality);
  $("hint").textContent = `This bridge connects ${names.join(", ").replace(/, ([^,]*)$/, " and $1")}. You can also drop or paste files anywhere on this page.`;
  showRecording();
  $("file").disabled = !can.some((modality) => modality !== "text");
}

// ---- requests

class Problem extends Error {
  constructor(error, status, later) {
    super(error.what);
    Object.assign(this, error, { status, later });
  }
}

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: { "X-Bridgekit-Client": CLIENT, ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ what: "The server is not responding.", fix: "check that bridgekit app is still running" });
  }
  if (answer.ok) return answer.headers.get("content-type").includes("json") ? answer.json() : answer;
  const { error } = await answer.json().catch(() => ({}));
  throw new Problem(error || { what: `The server returned status ${answer.status}.` }, answer.status, Number(answer.headers.get("retry-after")));
}

// Retries while the server is busy, at the intervals it asks for.
async function askWithRetries(path, options, waiting) {
  for (let tries = 1; ; tries++) {
    try {
      return await ask(path, options);
    } catch (error) {
      if (!error.later || tries >= TRIES) throw error;
      waiting(error);
      await pause(error.later * 1000, options.signal);
    }
  }
}

function pause(milliseconds, signal) {
  return new Promise((done, stop) => {
    const timer = setTimeout(done, milliseconds);
    signal.addEventListener("abort", () => { clearTimeout(timer); stop(new DOMException("", "AbortError")); });
  });
}

function form(fields) {
  const body = new FormData();
  body.append("bridge", $("bridge").value);
  for (const input of state.inputs) {
    if (input.modality === "text") body.append("text", input.text);
    else body.append(input.modality, input.blob, input.name);
  }
  for (const [name, value] of fields) body.append(name, value);
  return body;
}

const weights = () => (state.inputs.length > 1 ? `${(100 - $("share").value) / 100},${$("share").value / 100}` : "1");

// ---- inputs

function addInput(input) {
  if (input.modality !== "text" && input.blob.size > state.limits.upload_bytes) {
    return showError({ what: `${input.name} is larger than ${state.limits.upload_bytes / 1e6} MB`, fix: "send a shorter clip or a smaller image" });
  }
  if (state.adding || state.inputs.length === 2) state.inputs = [state.inputs[0], input];
  else state.inputs = [input];
  state.adding = false;
  state.seed = 0;
  clear();
  showInputs();
  run();
}

function addFile(file) {
  const image = file.type.startsWith("image/") || (!file.type.startsWith("audio/") && /\.(png|jpe?g|webp|gif|bmp|avif|tiff?)$/i.test(file.name));
  addInput({ modality: image ? "image" : "audio", blob: file, name: file.name });
}

function showInputs() {
  state.held.splice(0).forEach((address) => URL.revokeObjectURL(address));
  $("inputs").replaceChildren(...state.inputs.map((input, place) => {
    const item = make("li", {}, make("span", { className: "name", textContent: input.modality === "text" ? `“${input.text}”` : input.name }));
    const remove = make("button", { type: "button", textContent: "Remove" });
    remove.setAttribute("aria-label", `Remove ${input.name || input.text}`);
    remove.onclick = () => { state.inputs.splice(place, 1); showInputs(); $("words").focus(); if (state.inputs.length) run(); else clear(); };
    item.append(remove);
    if (input.modality !== "text") {
      const address = URL.createObjectURL(input.blob);
      state.held.push(address);
      item.append(input.modality === "audio" ? make("audio", { controls: true, src: address }) : make("img", { src: address, alt: input.name }));
    }
    return item;
  }));
  $("add").hidden = state.inputs.length !== 1;
  $("add").setAttribute("aria-pressed", state.adding);
  $("add").textContent = state.adding ? "Record, choose or type the second input…" : "Add a second input";
  $("mixing").hidden = state.inputs.length < 2;
  showShares();
}

function showShares() {
  const share = Number($("share").value);
  const name = (input) => input && (input.text || input.name);
  $("left").textContent = state.inputs.length > 1 ? `${name(state.inputs[0])} ${100 - share} %` : "";
  $("right").textContent = state.inputs.length > 1 ? `${name(state.inputs[1])} ${share} %` : "";
  $("share").setAttribute("aria-valuetext", `${$("left").textContent}, ${$("right").textContent}`);
}

function clear() {
  stop();
  stopPlayer();
  $("first").replaceChildren();
  $("rest").replaceChildren();
  for (const id of ["sure", "actions", "picture"]) $(id).hidden = true;
  $("nothing").hidden = false;
  $("empty").hidden = false;
  $("frame").className = "empty";
  $("status").textContent = "";
  $("problem").replaceChildren();
}

// ---- results

function run() {
  $("problem").replaceChildren();
  // On narrow screens the image is below the controls: scroll to it.
  if (matchMedia("(max-width: 44rem)").matches) $("see").scrollIntoView({ block: "start" });
  search();
  draw();
}

async function search() {
  state.searching?.abort();
  const mine = state.searching = new AbortController();
  const texts = state.inputs.every((input) => input.modality === "text");
  const sides = Object.entries(bridge().modalities).filter(([, side]) => !side.problem).map(([modality]) => modality);
  const others = texts && sides.length > 1 ? sides.filter((modality) => modality !== "text") : sides;
  const order = ["text", "image", "audio"];
  others.sort((a, b) => (order.indexOf(a) + 9) % 9 - (order.indexOf(b) + 9) % 9);
  if (!others.length) return;
  try {
    const body = form([...others.map((modality) => ["to", modality]), ["k", 5], ["weights", weights()]]);
    const { results } = await askWithRetries("/search", { method: "POST", body, signal: mine.signal }, (error) => { $("status").textContent = `${error.what} …`; });
    showNear(results);
  } catch (error) {
    if (error.name !== "AbortError") showError(error);
  }
}

function showNear(results) {
  const [first, ...rest] = results;
  const best = first?.found[0];
  $("nothing").hidden = Boolean(best);
  $("sure").hidden = !best;
  if (best) {
    const among = `${first.among.toLocaleString("en")} ${kind(first)}`;
    const percent = percentage(best.share);
    const heard = first.speech === null ? "" : first.speech > 0.5 ? "Speech. " : "A sound. ";
    $("sure-says").textContent = heard + (first.sure === false ? "Not sure; the nearest is" : "Best match");
    $("best").textContent = called(best, first.to);
    $("sure-bar").style.width = `${100 * best.share}%`;
    $("sure-text").textContent = `${percent} confidence among ${among}`;
    $("sure-means").textContent =
      `The probability of this result if one of the ${among} is correct: the softmax of all similarities at the bridge's learned ` +
      `temperature. Probabilities add up to 100 %, so the best match can have a high one even if nothing fits. The cosine ` +
      `similarity at the end of each line is then low.`;
  }
  $("first").replaceChildren(...(first ? [list(first)] : []));
  $("rest").replaceChildren(...rest.map(list));
  for (const section of $("rest").children) section.className = "card";
}

const kind = (result) => PLURAL[result.to]?.toLowerCase() || result.to;

function list(result) {
  const among = make("span", { textContent: `nearest of ${result.among.toLocaleString("en")}` });
  const title = make("h3", { textContent: `${PLURAL[result.to] || sentence(result.to)} ` }, among);
  const [layout, show] = { image: ["tiles", tile], audio: ["plays", playable] }[result.to] || ["bars", bar];
  return make("section", {}, title, make("ol", { className: layout }, ...result.found.map((found) => show(found, called(found, result.to), details(found, result.to)))));
}

// What a result is called: its caption rather than its file's name, where the table has one.
const called = (found, modality) => found.captions[0] ?? plain(found.item, modality);

// The other captions, the file's name below a caption, and the table's other columns.
function details(found, modality) {
  const lines = found.captions.slice(1).map((caption) => make("span", { textContent: caption }));
  if (modality !== "text" && found.captions.length) lines.push(make("span", { className: "cell", textContent: found.item }));
  for (const [name, cell] of Object.entries(found.columns)) lines.push(make("span", { className: "cell", textContent: `${name}: ${cell}` }));
  for (const line of lines) line.title = line.textContent; // the page shows no more than two lines of each
  return make("span", { className: "details" }, ...lines);
}

function score(found, before = "") {
  const made = make("span", { className: "score", textContent: `${before}${found.similarity.toFixed(2).replace(/^-(0\.00)$/, "$1")}`, title: "cosine similarity" });
  made.append(make("span", { className: "unseen", textContent: " cosine similarity" }));
  return made;
}

function bar(found, name, details) {
  const made = make("span", { className: "bar" }, make("span", {}));
  made.setAttribute("aria-hidden", "true");
  made.firstChild.style.width = `${100 * found.share}%`;
  return make("li", {}, make("span", { className: "name", textContent: name }), score(found, `${percentage(found.share)} · `), made, details);
}

function tile(found, name, details) {
  const caption = make("span", { className: "caption", textContent: `${name} `, title: name });
  return make("li", {}, make("img", { src: found.media, alt: name, loading: "lazy" }), caption, score(found), details);
}

function playable(found, name, details) {
  const button = make("button", { type: "button", className: "play" });
  button.setAttribute("aria-label", `Play ${name}`);
  button.setAttribute("aria-pressed", "false");
  button.onclick = () => play(button, found.media);
  return make("li", {}, button, make("span", { className: "name", textContent: name }), score(found), details);
}

// One player for all clips: starting one stops the previous one.
const player = new Audio();
let playing = null;

function play(button, address) {
  const again = playing === button;
  stopPlayer();
  if (again) return;
  playing = button;
  button.setAttribute("aria-pressed", "true");
  player.src = address;
  player.play().catch((error) => { if (error.name !== "AbortError") { stopPlayer(); showError({ what: "The clip cannot be played.", where: error.message }); } });
}

function stopPlayer() {
  player.pause();
  playing?.setAttribute("aria-pressed", "false");
  playing = null;
}

player.onended = stopPlayer;

const plain = (item, modality) => (modality === "text" ? item : item.replace(/\.[A-Za-z0-9]+$/, "").replace(/[-_]+/g, " "));
const percentage = (share) => (share > 0.995 ? "over 99 %" : share < 0.005 ? "under 1 %" : `${Math.round(100 * share)} %`);

async function draw() {
  stop();
  if (!$("model").value) return;
  const mine = state.work = new AbortController();
  working("Encoding…", null);
  try {
    const fields = [["model", $("model").value], ["weights", weights()], ["seed", state.seed]];
    if ($("prompt").value.trim()) fields.push(["prompt", $("prompt").value.trim()]);
    const options = { method: "POST", body: form(fields), signal: mine.signal, headers: { Accept: "text/event-stream" } };
    const answer = await askWithRetries("/generate", options, (error) => working(`${error.what}. Waiting…`, null));
    for await (const [kind, what] of events(answer.body)) {
      if (kind === "queued") working(what.before ? `${what.before} ahead of you in the queue…` : "Starting…", null);
      if (kind === "preparing") working(preparation(what), what.of > 1 ? what.done / what.of : null);
      if (kind === "progress") working(`${sentence(what.what)}${what.of > 1 ? ` ${what.done} of ${what.of}` : "…"}`, what.of > 1 ? what.done / what.of : null);
      if (kind === "preview") show(`data:image/jpeg;base64,${what.picture}`, "forming", "Preview of the image");
      if (kind === "done") finish(what);
      if (kind === "error") throw new Problem(what);
    }
  } catch (error) {
    if (error.name !== "AbortError" && mine === state.work) { idle(""); showError(error); }
  }
}

function finish(made) {
  show(`data:image/png;base64,${made.picture}`, "", `Image generated from ${made.inputs.join(" and ")}`);
  $("save").href = $("picture").src;
  $("save").download = `${(made.nearest[0]?.item || "bridgekit").replace(/[^\w-]+/g, "_")}.png`;
  $("actions").hidden = false;
  const nearest = $("sure").hidden && made.nearest.length ? ` Nearest: ${made.nearest.map((near) => near.item).join(", ")}.` : "";
  idle(`Generated in ${made.seconds.toFixed(1)} s, ${made.width} × ${made.height} pixels.${nearest}`);
}

// Shows a blob rather than the data URL: the content security policy forbids data URLs.
function show(address, how, alt) {
  const [, kind, data] = address.match(/^data:([^;]+);base64,(.*)$/);
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  const old = $("picture").src;
  $("picture").src = URL.createObjectURL(new Blob([bytes], { type: kind }));
  if (old) URL.revokeObjectURL(old);
  $("picture").alt = alt;
  $("picture").hidden = false;
  $("empty").hidden = true;
  $("frame").className = how;
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const [, kind, data] = block.match(/^event: (.*)\ndata: (.*)$/s);
      yield [kind, JSON.parse(data)];
    }
  }
}

function working(says, share) {
  $("work").hidden = false;
  if (share === null) $("progress").removeAttribute("value");
  else $("progress").value = share;
  if ($("status").textContent !== says) $("status").textContent = says;
}

function idle(says) {
  $("work").hidden = true;
  $("frame").classList.remove("forming");
  $("status").textContent = says;
  state.work = null;
}

function stop() {
  state.work?.abort();
  if (state.work) idle("");
}

function showError(error) {
  if (error.name === "AbortError") return;
  $("problem").replaceChildren(make("strong", { textContent: error.what || error.message }));
  if (error.where) $("problem").append(make("span", { textContent: `in: ${error.where}` }));
  if (error.fix) $("problem").append(make("span", { textContent: `fix: ${error.fix}` }));
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1);

function make(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// ---- the microphone

let recording = null;
let recordings = 0;

// Says why nothing can be recorded, where that is so.
async function showRecording() {
  const found = await microphones();
  if (recording) return;
  let why = "";
  if (!("audio" in bridge().modalities)) why = "This bridge has no audio, so there is nothing to record for it.";
  else if (!window.isSecureContext) why = "Browsers record only on pages at http://127.0.0.1 or over HTTPS. A file can be chosen instead.";
  else if (!found) why = "This browser has no microphone. A file can be chosen instead.";
  $("record").disabled = Boolean(why);
  $("record").title = why;
  $("record-why").textContent = why;
  $("record-why").hidden = !why;
}

async function microphones() {
  const devices = await navigator.mediaDevices?.enumerateDevices().catch(() => []);
  return (devices ?? []).filter((device) => device.kind === "audioinput").length;
}

async function record() {
  const quiet = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: quiet });
  } catch (error) {
    const what = error.name === "NotFoundError" ? "No microphone was found." : "The browser blocked access to the microphone.";
    return showError({ what, fix: "allow the microphone in the browser, or choose a file" });
  }
  const context = new AudioContext();
  await context.audioWorklet.addModule("/static/recorder.js");
  const node = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
  const blocks = [];
  let frames = 0;
  node.port.onmessage = ({ data }) => {
    blocks.push(data);
    frames += data.length;
    const peak = data.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0);
    $("level").firstChild.style.transform = `scaleX(${Math.min(1, peak * 1.5)})`;
    $("record-text").textContent = `Stop (${(frames / context.sampleRate).toFixed(1)} s)`;
    if (frames >= (state.limits.clip_seconds - 1) * context.sampleRate) finishRecording();
  };
  context.createMediaStreamSource(stream).connect(node);
  recording = { stream, context, node, blocks };
  $("record").setAttribute("aria-pressed", "true");
  $("record-text").textContent = "Stop";
  $("level").hidden = false;
  $("problem").replaceChildren();
}

function finishRecording() {
  const { stream, context, node, blocks } = recording;
  recording = null;
  node.port.onmessage = null;
  stream.getTracks().forEach((track) => track.stop());
  const rate = context.sampleRate;
  context.close();
  $("record").setAttribute("aria-pressed", "false");
  $("record-text").textContent = "Record";
  $("level").hidden = true;
  const sound = trim(joined(blocks), rate);
  if (!sound.length) return showError({ what: "The recording is silent.", fix: "check that the right microphone is selected and not muted" });
  addInput({ modality: "audio", blob: wav(sound, rate), name: `recording ${++recordings}.wav` });
}

function joined(blocks) {
  const all = new Float32Array(blocks.reduce((sum, block) => sum + block.length, 0));
  let at = 0;
  for (const block of blocks) { all.set(block, at); at += block.length; }
  return all;
}

// Trims silence at both ends to 0.1 s, since encoders average over the whole clip. Silence is anything more than 40 dB below the
// loudest 20 ms.
function trim(samples, rate) {
  const size = Math.round(rate / 50);
  const levels = [];
  for (let at = 0; at + size <= samples.length; at += size) {
    levels.push(Math.sqrt(samples.subarray(at, at + size).reduce((sum, sample) => sum + sample * sample, 0) / size));
  }
  const most = Math.max(...levels, 0);
  if (most < 1e-4) return new Float32Array(0);
  const audible = (level) => level > most / 100;
  const margin = Math.round(rate / 10);
  const from = levels.findIndex(audible) * size - margin;
  const to = (levels.findLastIndex(audible) + 1) * size + margin;
  return samples.subarray(Math.max(0, from), Math.min(samples.length, to));
}

function wav(samples, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const letters = (at, text) => [...text].forEach((letter, place) => view.setUint8(at + place, letter.charCodeAt(0)));
  letters(0, "RIFF"); view.setUint32(4, 36 + 2 * samples.length, true); letters(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, rate, true); view.setUint32(28, 2 * rate, true); view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  letters(36, "data"); view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, place) => view.setInt16(44 + 2 * place, Math.max(-1, Math.min(1, sample)) * 32767, true));
  return new Blob([view], { type: "audio/wav" });
}

// ---- controls

navigator.mediaDevices?.addEventListener("devicechange", showRecording);
$("record").onclick = () => (recording ? finishRecording() : record());
$("file").onchange = () => { if ($("file").files.length) addFile($("file").files[0]); $("file").value = ""; };
$("write").onsubmit = (event) => {
  event.preventDefault();
  const text = $("words").value.trim();
  if (text) { addInput({ modality: "text", text }); $("words").value = ""; }
};
$("add").onclick = () => { state.adding = !state.adding; showInputs(); };
$("share").oninput = () => { showShares(); clearTimeout(state.soon); state.soon = setTimeout(search, 200); };
$("share").onchange = draw;
$("bridge").onchange = () => { hint(); if (state.inputs.length) run(); };
$("model").onchange = () => { if (state.inputs.length) draw(); };
$("prompt").onchange = () => { if (state.inputs.length) draw(); };
$("again").onclick = () => { state.seed += 1; draw(); };
$("cancel").onclick = () => { stop(); $("status").textContent = "Cancelled."; $("words").focus(); };
addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
addEventListener("dragleave", () => document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (event.dataTransfer.files.length) addFile(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => { if (event.clipboardData.files.length) addFile(event.clipboardData.files[0]); });

start();
