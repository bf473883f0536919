// The page of `echostream serve`: sound to the server, text and speech back, and a connection that may break.
// docs/server.md describes the protocol.

const $ = (id) => document.getElementById(id);
const seconds = (s) => (Number.isFinite(s) ? `${s.toFixed(1)} s` : "–");
const clock = (s) => `${Math.floor(s / 60)}:${String(Math.floor(s % 60)).padStart(2, "0")}`;
const QUIET = 0.02; // a peak that no speech at arm's length stays below
const FILE_PIECE_S = 0.2;

// What each policy's slider moves: knob, least, most, unit, milliseconds of a step (0: unknown).
const SLIDERS = {
  "alignatt": ["alignatt_frames", 1, 40, 40],
  "wait-k": ["wait_k", 1, 12, 0],
  "ctc": ["lagging_k1", 0, 8, 0],
  "local-agreement": ["agreement_n", 2, 5, 0],
  "sentence": null,
};

function base64(samples) {
  const bytes = new Uint8Array(samples.buffer, samples.byteOffset, samples.byteLength);
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}

function floats(coded) {
  const text = atob(coded);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return Float32Array.from(new Int16Array(bytes.buffer), (value) => value / 32768);
}

// One stream, whatever happens to its connection: sound is kept until the server has made it safe.
class Stream {
  constructor(rate, outputRate, options, token, handle) {
    Object.assign(this, { rate, outputRate, options, token, handle });
    this.id = ""; this.last = -1; this.pieces = []; this.base = 0; this.total = 0; this.sent = 0;
    this.ended = this.closed = this.ready = false; this.acked = -1; this.wait = 100; this.began = 0;
    this.connect();
  }

  push(samples) {
    if (this.ended) return;
    this.pieces.push(samples);
    this.total += samples.length;
    this.pump();
  }

  end() { this.ended = true; this.pump(); }

  connect() {
    const query = new URLSearchParams({ echostream: 1 });
    if (this.id) { query.set("session", this.id); query.set("samples", this.total); query.set("last_event", this.last); }
    const url = `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/v1/realtime/translations?${query}`;
    const socket = this.socket = new WebSocket(url, ["realtime", ...(this.token ? [`openai-insecure-api-key.${this.token}`] : [])]);
    socket.onmessage = ({ data }) => { if (socket === this.socket) this.take(JSON.parse(data)); };
    socket.onclose = () => { if (socket === this.socket) this.broken(); };
  }

  broken() {
    const never = !this.id;
    this.ready = false;
    this.socket = null;
    if (this.closed) return;
    if (never) { this.fail("The server has no place for one more session, or wants a token. Try again in a moment."); return; }
    this.began ||= performance.now();
    if (performance.now() - this.began > 60000) { this.fail("The connection is lost."); return; }
    this.handle({ type: "page.waiting" });
    setTimeout(() => this.connect(), this.wait);
    this.wait = Math.min(1000, this.wait * 1.6);
  }

  fail(message) { this.closed = true; this.handle({ type: "page.failed", message }); }

  take(event) {
    if (event.type === "session.created") {
      const ours = event.session.echostream;
      if (this.id) {
        this.sent = ours.received_samples; this.ready = true; this.began = 0; this.wait = 100;
        this.handle({ type: "page.back" });
        this.pump();
      } else {
        this.created = event.session.id;
        this.socket.send(JSON.stringify({ type: "session.update", session: {
          audio: { input: { transcription: { model: "echostream" } } },
          echostream: { input_rate: this.rate, output_rate: this.outputRate, ...this.options },
        } }));
      }
      return;
    }
    if (event.type === "session.updated" && !this.id) { this.id = this.created; this.ready = true; this.pump(); return; }
    if (event.type === "error") {
      if (!this.id) this.fail(event.error.message); else this.handle(event);
      return;
    }
    if (event.type === "echostream.progress") { this.forget(event.safe_samples); return; }
    if (event.sequence !== undefined) {
      if (event.sequence <= this.last) return;
      this.last = event.sequence;
    }
    if (event.type === "session.closed") this.closed = true;
    this.handle(event);
    if (this.closed || this.last - this.acked >= 8) this.ack();
    if (this.closed) this.socket.close(1000);
  }

  ack() {
    this.acked = this.last;
    this.socket.send(JSON.stringify({ type: "echostream.ack", sequence: this.last }));
  }

  forget(safe) {
    while (this.pieces.length && this.base + this.pieces[0].length <= Math.min(safe, this.sent)) {
      this.base += this.pieces.shift().length;
    }
  }

  pump() {
    if (!this.ready) return;
    let at = this.base;
    for (const piece of this.pieces) {
      if (this.sent < at + piece.length) {
        if (this.socket.bufferedAmount > 1 << 20) { setTimeout(() => this.pump(), 100); return; }
        const part = piece.subarray(this.sent - at);
        this.socket.send(JSON.stringify({ type: "session.input_audio_buffer.append", audio: base64(part) }));
        this.sent = at + piece.length;
      }
      at += piece.length;
    }
    if (this.ended && !this.said) { this.said = true; this.socket.send('{"type": "session.close"}'); }
  }
}

// What was heard and said, for the timeline and the files.
class Record {
  constructor(rate) {
    this.rate = rate; this.peaks = []; this.heard = 0; this.speech = []; this.spoken = []; this.sentences = [];
    this.words = []; this.lags = []; this.firstVoice = NaN; this.firstSound = NaN; this.startedAt = 0;
  }
}

// What the worklet's player does, where browsers give a page none: by http:// off localhost. A recording can be played there.
class ScheduledPlayer {
  constructor(context) { Object.assign(this, { context, port: this, at: 0, played: 0 }); }

  connect(destination) { this.destination = destination; }

  postMessage(samples) {
    const buffer = this.context.createBuffer(1, samples.length, this.context.sampleRate);
    buffer.copyToChannel(samples, 0);
    const node = new AudioBufferSourceNode(this.context, { buffer });
    node.connect(this.destination);
    this.at = Math.max(this.at, this.context.currentTime);
    node.start(this.at);
    setTimeout(() => this.tell(1), 1000 * (this.at - this.context.currentTime)); // it begins
    this.at += buffer.duration;
    node.onended = () => this.tell(samples.length - 1);
  }

  tell(more) {
    this.played += more;
    this.onmessage({ data: { played: this.played, time: this.context.currentTime } });
  }
}

let config, stream, record, audio, capture, player, playedSamples = 0, queuedSamples = 0, idle = true;

async function setUp() {
  config = await (await fetch("config.json")).json();
  $("pair").textContent = `${config.source_language} → ${config.target_language}` + (config.speech ? "" : ", text only");
  $("sourceName").textContent = `Heard (${config.source_language})`;
  $("targetName").textContent = `Translation (${config.target_language})`;
  $("tokenRow").hidden = !config.token;
  for (const name of Object.keys(SLIDERS)) $("policy").add(new Option(name, name, name === config.policy, name === config.policy));
  $("policy").onchange = setSlider;
  $("latency").oninput = showSlider;
  setSlider();
  $("secure").hidden = window.isSecureContext;
  if (!window.isSecureContext || !navigator.mediaDevices) $("source").value = "file";
  if (!config.speech) { $("play").checked = false; $("play").disabled = true; }
  draw();
}

function setSlider() {
  const slider = SLIDERS[$("policy").value];
  $("latencyRow").hidden = !slider;
  if (!slider) return;
  const [knob, least, most] = slider;
  Object.assign($("latency"), { min: least, max: most, step: 1 });
  $("latency").value = config.knobs[knob] ?? Math.round((least + most) / 4);
  showSlider();
}

function showSlider() {
  const [knob, , , step] = SLIDERS[$("policy").value];
  const value = Number($("latency").value);
  $("latencyValue").textContent = step ? `${value * step} ms` : `${knob.replaceAll("_", " ")} ${value}`;
}

function options() {
  const name = $("policy").value, slider = SLIDERS[name], chosen = {};
  const value = Number($("latency").value);
  if (name !== config.policy) chosen.policy = name;
  if (slider && (chosen.policy || config.knobs[slider[0]] !== value)) chosen[slider[0]] = value;
  if (config.speech && !$("play").checked) chosen.speech = false;
  return chosen;
}

function hint(text) { $("hint").textContent = text; }

async function start(file) {
  if (!idle) return;
  idle = false;
  hint("");
  $("start").disabled = true;
  $("sourceText").replaceChildren();
  $("targetText").replaceChildren();
  try {
    audio = new AudioContext(); // at the device's own rate
    await audio.resume();
    if (audio.audioWorklet) await audio.audioWorklet.addModule("worklet.js");
    record = new Record(audio.sampleRate);
    player = audio.audioWorklet
      ? new AudioWorkletNode(audio, "player", { numberOfInputs: 0, outputChannelCount: [2] })
      : new ScheduledPlayer(audio);
    player.connect(audio.destination);
    playedSamples = queuedSamples = 0;
    player.port.onmessage = ({ data }) => {
      if (!playedSamples && data.played) firstSound();
      playedSamples = data.played;
      $("drop").dataset.played = playedSamples;
    };
    const source = file ? "file" : $("source").value;
    const feed = await open(source, file);
    record.startedAt = performance.now();
    stream = new Stream(audio.sampleRate, audio.sampleRate, options(), $("token").value, take);
    $("stop").disabled = false;
    feed();
  } catch (error) {
    const denied = error.name === "NotAllowedError";
    await finish(denied ? "The browser was not allowed to listen." : `It cannot be heard: ${error.message}`);
  }
}

// Returns what begins to feed the stream.
async function open(source, file) {
  if (source === "file") {
    const chosen = file ?? $("file").files[0] ?? (await pick());
    const sound = await audio.decodeAudioData(await chosen.arrayBuffer()); // resamples to the device's rate
    const mono = new Float32Array(sound.length);
    for (let c = 0; c < sound.numberOfChannels; c++) {
      const channel = sound.getChannelData(c);
      for (let i = 0; i < mono.length; i++) mono[i] += channel[i] / sound.numberOfChannels;
    }
    const samples = Int16Array.from(mono, (x) => Math.max(-32768, Math.min(32767, Math.round(x * 32768))));
    return () => {
      const piece = Math.round(audio.sampleRate * FILE_PIECE_S);
      let at = 0;
      capture = { stop() { clearInterval(timer); } };
      const timer = setInterval(() => {
        if (at >= samples.length) { stop(); return; }
        const part = samples.slice(at, at + piece);
        at += piece;
        hear(part, part.reduce((peak, x) => Math.max(peak, Math.abs(x)), 0) / 32768);
      }, FILE_PIECE_S * 1000);
    };
  }
  const media = source === "tab"
    ? await navigator.mediaDevices.getDisplayMedia({ video: true, audio: { suppressLocalAudioPlayback: false } })
    : await navigator.mediaDevices.getUserMedia({ audio: { echoCancellation: true, noiseSuppression: false, autoGainControl: true } });
  if (!media.getAudioTracks().length) {
    for (const track of media.getTracks()) track.stop();
    throw new Error("the tab was shared without its sound");
  }
  const node = audio.createMediaStreamSource(media);
  const recorder = new AudioWorkletNode(audio, "recorder", { numberOfOutputs: 0 });
  for (const track of media.getAudioTracks()) track.onended = stop;
  return () => {
    recorder.port.onmessage = ({ data }) => hear(data.samples, data.peak);
    node.connect(recorder);
    capture = { stop() { node.disconnect(); for (const track of media.getTracks()) track.stop(); } };
  };
}

function pick() {
  return new Promise((resolve, reject) => {
    $("file").onchange = () => resolve($("file").files[0]);
    $("file").oncancel = () => reject(new Error("no recording was chosen"));
    $("file").click();
  });
}

function hear(samples, peak) {
  if (!stream || stream.ended) return;
  stream.push(samples);
  record.heard += samples.length;
  record.peaks.push([record.heard / record.rate, peak]);
  if (Number.isNaN(record.firstVoice) && peak > QUIET) record.firstVoice = performance.now();
  $("level").value = Math.min(1, Math.sqrt(peak));
  $("heard").textContent = clock(record.heard / record.rate);
  const now = record.heard / record.rate;
  const loud = Math.max(...record.peaks.slice(-100).filter(([t]) => t > now - 8).map(([, p]) => p));
  if (now > 8) hint(loud < QUIET ? "Very quiet: is the microphone on, and close enough?" : loud > 0.99 ? "Too loud: it is clipped." : "");
}

function firstSound() {
  record.firstSound = (performance.now() - record.firstVoice) / 1000;
  $("firstSound").textContent = seconds(record.firstSound);
}

function take(event) {
  switch (event.type) {
    case "session.input_transcript.delta": write("sourceText", event); break;
    case "session.output_transcript.delta":
      record.words.push([event.elapsed_ms / 1000, event.delta]);
      write("targetText", event);
      break;
    case "session.output_audio.delta": {
      const samples = floats(event.delta);
      // On the source's clock speech begins when it is there, or when the speech before it ends.
      const before = record.spoken.length ? record.spoken.at(-1)[1] : 0;
      const begin = Math.max(event.elapsed_ms / 1000, before);
      record.spoken.push([begin, begin + samples.length / record.rate]);
      record.speech.push([begin, samples]);
      queuedSamples += samples.length;
      if ($("play").checked) player.port.postMessage(samples);
      break;
    }
    case "echostream.sentence":
      record.sentences.push(event);
      if (event.lag.laal_ms !== null) {
        record.lags.push(event.lag.laal_ms / 1000);
        $("lagNow").textContent = seconds(record.lags.at(-1));
        $("lagMean").textContent = seconds(record.lags.reduce((a, b) => a + b) / record.lags.length);
      }
      break;
    case "error": hint(event.error.message); break;
    case "page.waiting": hint("The connection is broken; nothing is lost. Coming back …"); break;
    case "page.back": hint(""); break;
    case "page.failed": finish(event.message); break;
    case "session.closed": finish(""); break;
  }
}

function write(id, event) {
  const box = $(id), follow = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  let line = box.lastElementChild;
  if (!line || line.dataset.sentence !== String(event.sentence)) {
    line = document.createElement("p");
    line.dataset.sentence = event.sentence;
    const time = document.createElement("time");
    time.textContent = clock(event.elapsed_ms / 1000);
    line.append(time);
    box.append(line);
  }
  const words = document.createElement("span");
  words.className = "new";
  words.title = `after ${seconds(event.elapsed_ms / 1000)} of sound`;
  words.textContent = line.childElementCount === 1 ? event.delta.trimStart() : event.delta;
  line.append(words);
  setTimeout(() => words.classList.remove("new"), 1500);
  if (follow) box.scrollTop = box.scrollHeight;
}

function stop() {
  hint("");
  $("stop").disabled = true;
  capture?.stop();
  capture = null;
  stream?.end();
  $("level").value = 0;
}

async function finish(message) {
  capture?.stop();
  capture = null;
  $("stop").disabled = true;
  for (const id of ["saveSrt", "savePng"]) $(id).disabled = !record?.heard;
  $("saveWav").disabled = !record?.speech.length;
  if (message) hint(message);
  // The voice may still be speaking.
  const context = audio, deadline = performance.now() + 120000;
  while (context && !message && $("play").checked && playedSamples < queuedSamples && performance.now() < deadline) {
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  await context?.close();
  $("start").disabled = false;
  idle = true;
}

// Pictures and files.

function paint(canvas, begin, end) {
  const style = getComputedStyle(document.documentElement), paintbrush = canvas.getContext("2d");
  const { width, height } = canvas, x = (t) => ((t - begin) / (end - begin)) * width;
  const color = (name) => style.getPropertyValue(name);
  const size = 11 * (canvas.ratio ?? 1);
  paintbrush.fillStyle = color("--card");
  paintbrush.fillRect(0, 0, width, height);
  paintbrush.font = `${size}px system-ui, sans-serif`;
  paintbrush.fillStyle = color("--soft");
  for (let t = Math.ceil(begin); t <= end; t++) if (t % 5 === 0 && t >= 0) paintbrush.fillText(clock(t), x(t) + 2, height - 3);
  if (!record) return;
  paintbrush.fillStyle = color("--source");
  for (const [t, peak] of record.peaks) {
    const tall = Math.sqrt(peak) * height * 0.22;
    if (t >= begin && t <= end) paintbrush.fillRect(x(t - 0.1), height * 0.25 - tall, Math.max(1, x(t) - x(t - 0.09)), 2 * tall);
  }
  paintbrush.fillStyle = color("--target");
  for (const [from, to] of record.spoken) {
    if (to >= begin && from <= end) paintbrush.fillRect(x(from), height * 0.58, Math.max(1, x(to) - x(from) - 1), height * 0.16);
  }
  let free = -Infinity;
  for (const [t, text] of record.words) {
    const left = Math.max(x(t), free);
    if (left > width) continue;
    paintbrush.fillText(text.trim(), left, height * 0.54);
    free = left + paintbrush.measureText(`${text.trim()} `).width;
  }
}

function draw() {
  const canvas = $("timeline"), ratio = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(canvas.clientWidth * ratio)) {
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(120 * ratio);
  }
  canvas.ratio = ratio;
  const last = record ? Math.max(record.heard / record.rate, record.spoken.at(-1)?.[1] ?? 0, 12) : 12;
  paint(canvas, last - 12, last);
  setTimeout(() => requestAnimationFrame(draw), idle ? 500 : 100);
}

function save(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function wav() {
  const rate = record.rate, end = record.spoken.at(-1)[1], count = Math.ceil(end * rate);
  const view = new DataView(new ArrayBuffer(44 + 2 * count));
  const text = (at, value) => [...value].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * count, true); text(8, "WAVEfmt "); view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); view.setUint16(22, 1, true); view.setUint32(24, rate, true); view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true); view.setUint16(34, 16, true); text(36, "data"); view.setUint32(40, 2 * count, true);
  for (const [begin, samples] of record.speech) {
    const at = Math.round(begin * rate);
    for (let i = 0; i < samples.length && at + i < count; i++) {
      view.setInt16(44 + 2 * (at + i), Math.max(-32768, Math.min(32767, Math.round(samples[i] * 32768))), true);
    }
  }
  return new Blob([view], { type: "audio/wav" });
}

function srt() {
  const stamp = (ms) => {
    const pad = (value, width = 2) => String(Math.floor(value)).padStart(width, "0");
    return `${pad(ms / 3600000)}:${pad((ms / 60000) % 60)}:${pad((ms / 1000) % 60)},${pad(ms % 1000, 3)}`;
  };
  return record.sentences.filter((s) => s.text).map((s, i) => {
    const end = Math.max(s.end_ms, s.start_ms + 500);
    return `${i + 1}\n${stamp(s.start_ms)} --> ${stamp(end)}\n${s.text}\n`;
  }).join("\n");
}

function png() {
  const end = Math.max(record.heard / record.rate, record.spoken.at(-1)?.[1] ?? 0, 1);
  const canvas = document.createElement("canvas");
  canvas.width = Math.min(16000, Math.max(800, Math.ceil(end * 120)));
  canvas.height = 240;
  canvas.ratio = 1.6;
  paint(canvas, 0, end);
  canvas.toBlob((blob) => save("timeline.png", blob), "image/png");
}

$("start").onclick = () => start();
$("stop").onclick = stop;
$("saveWav").onclick = () => save("translation.wav", wav());
$("saveSrt").onclick = () => save("translation.srt", new Blob([srt()], { type: "application/x-subrip" }));
$("savePng").onclick = png;
$("drop").ondragover = (event) => { event.preventDefault(); $("drop").classList.add("over"); };
$("drop").ondragleave = () => $("drop").classList.remove("over");
$("drop").ondrop = (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  if (event.dataTransfer.files.length) start(event.dataTransfer.files[0]);
};
setUp().catch((error) => hint(`The server does not answer: ${error.message}`));
