"use strict";
// Asks /ui/state once a second and draws it; the chat box streams from /v1/chat/completions.

const POLL_MS = 1000;
const KEY_NAME = "text-generation-key";
const $ = (id) => document.getElementById(id);
let apiKey = sessionStorage.getItem(KEY_NAME) || "";
let state = null;

// Numbers as people read them.

function count(value) {
  if (value >= 1e6) return (value / 1e6).toFixed(value >= 1e7 ? 0 : 1) + "M";
  if (value >= 1e4) return (value / 1e3).toFixed(value >= 1e5 ? 0 : 1) + "k";
  return value >= 100 || Number.isInteger(value) ? String(Math.round(value)) : value.toFixed(1);
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds >= 1) return seconds.toFixed(seconds >= 10 ? 0 : 1) + " s";
  const ms = seconds * 1000;
  return ms.toFixed(ms >= 100 ? 0 : ms >= 1 ? 1 : 2) + " ms";
}

const percent = (share) => (share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0) + " %";

function uptime(seconds) {
  const parts = [[86400, "d"], [3600, "h"], [60, "min"]];
  for (const [size, unit] of parts) if (seconds >= size) return Math.floor(seconds / size) + " " + unit;
  return Math.floor(seconds) + " s";
}

// Columns of a sample, as the server names them.

const column = (name) => (sample) => sample[state.columns.indexOf(name)];
const share = (name) => (sample) => column(name)(sample) / state.num_blocks;

const CHARTS = [
  { title: "Sequences", format: count, isStacked: true, floor: 4,
    series: [["running", column("running")], ["waiting", column("waiting")]] },
  { title: "KV memory", format: percent, isStacked: true, top: 1,
    series: [["in use", share("used_blocks")], ["kept", share("cached_blocks")]] },
  { title: "Tokens a second", format: count, floor: 10,
    series: [["generated", column("generated_per_s")], ["prompt", column("prompt_per_s")]] },
  { title: "Time to first token", format: duration, floor: 0.01,
    series: [["p50", column("first_token_p50_s")], ["p99", column("first_token_p99_s")]] },
  { title: "Between tokens", format: duration, floor: 0.005,
    series: [["p50", column("next_token_p50_s")], ["p99", column("next_token_p99_s")]] },
];

const TILES = [
  ["Running", (s) => count(column("running")(s)), () => "in the batch"],
  ["Waiting", (s) => count(column("waiting")(s)), () => "in the queue"],
  ["KV memory", (s) => percent(share("used_blocks")(s)),
    () => "of " + count(state.num_blocks * state.block_size) + " tokens"],
  ["Generated", (s) => count(column("generated_per_s")(s)), () => "tokens a second"],
  ["First token", (s) => duration(column("first_token_p50_s")(s)),
    (s) => "p99 " + duration(column("first_token_p99_s")(s))],
  ["Between tokens", (s) => duration(column("next_token_p50_s")(s)),
    (s) => "p99 " + duration(column("next_token_p99_s")(s))],
];

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Drawing.

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function pen(canvas, height) {
  const width = canvas.clientWidth, scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.height = height + "px";
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.font = "11px system-ui, 'DejaVu Sans', sans-serif";
  return [context, width];
}

function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 6, 8, 10].find((step) => step * power >= value * 0.999) * power;
}

const LEFT = 46, RIGHT = 4, TOP = 8, BOTTOM = 18, CHART_HEIGHT = 128;

class Chart {
  constructor(kind) {
    this.kind = kind;
    this.hovered = null;
    const figure = element("figure", "card");
    const caption = element("figcaption");
    caption.append(element("b", "", kind.title));
    this.legend = element("span", "legend");
    caption.append(this.legend);
    this.canvas = element("canvas");
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", kind.title);
    figure.append(caption, this.canvas);
    $("charts").append(figure);
    this.canvas.addEventListener("mousemove", (event) => this.hover(event));
    this.canvas.addEventListener("mouseleave", () => { this.hovered = null; hideTip(); this.draw(); });
  }

  // Values of each series, and where stacked ones end.
  values() {
    const rows = this.kind.series.map(([, read]) => state.samples.map(read));
    if (!this.kind.isStacked) return rows;
    return rows.map((_, index) => state.samples.map((_, at) =>
      rows.slice(0, index + 1).reduce((sum, row) => sum + row[at], 0)));
  }

  draw() {
    if (!state) return;
    const [context, width] = pen(this.canvas, CHART_HEIGHT);
    const rows = this.values(), { kind } = this;
    const highest = Math.max(kind.floor || 0, ...rows.flat().filter((value) => value !== null));
    const top = kind.top || roundUp(highest);
    this.x = (at) => LEFT + (width - LEFT - RIGHT) * (at + state.max_samples - state.samples.length) /
      (state.max_samples - 1);
    const y = (value) => TOP + (CHART_HEIGHT - TOP - BOTTOM) * (1 - value / top);
    this.drawGrid(context, width, top, y);
    const zero = rows[0].map(() => 0);
    for (let index = rows.length - 1; index >= 0; index--) {
      this.drawSeries(context, rows[index], kind.isStacked && index ? rows[index - 1] : zero, index, y);
    }
    if (this.hovered !== null) {
      context.fillStyle = color("--muted");
      context.fillRect(this.x(this.hovered), TOP, 1, CHART_HEIGHT - TOP - BOTTOM);
    }
    const last = state.samples[state.samples.length - 1];
    this.legend.replaceChildren(...kind.series.flatMap(([name, read], index) =>
      [element("i", "key-" + index), `${name} ${kind.format(read(last))}`]));
  }

  drawGrid(context, width, top, y) {
    context.lineWidth = 1;
    for (const part of [0, 0.5, 1]) {
      context.fillStyle = color("--line");
      context.fillRect(LEFT, Math.round(y(top * part)), width - LEFT - RIGHT, 1);
      context.fillStyle = color("--muted");
      context.textAlign = "right";
      context.fillText(part ? this.kind.format(top * part) : "0", LEFT - 6, y(top * part) + 4);
    }
    const minutes = Math.round(state.max_samples * state.interval_s / 60);
    const stride = width < 380 ? 2 : 1;  // or they would cover each other
    for (let minute = minutes % stride; minute <= minutes; minute += stride) {
      const at = state.samples.length - 1 - (minutes - minute) * 60 / state.interval_s;
      context.textAlign = minute === minutes ? "right" : minute ? "center" : "left";
      const text = minute === minutes ? "now" : `−${minutes - minute} min`;
      context.fillText(text, Math.max(LEFT, this.x(at)), CHART_HEIGHT - 4);
    }
  }

  // The line of a row, and the area between it and the row below.
  drawSeries(context, row, below, index, y) {
    const ink = color(index ? "--second" : "--first");
    context.strokeStyle = context.fillStyle = ink;
    context.lineWidth = 1.5;
    context.lineJoin = "round";
    for (const [start, end] of runs(row)) {
      const line = new Path2D();
      for (let at = start; at < end; at++) line.lineTo(this.x(at), y(row[at]));
      if (end - start === 1) line.lineTo(this.x(start) + 2, y(row[start]));
      context.stroke(line);
      for (let at = end - 1; at >= start; at--) line.lineTo(this.x(at), y(below[at]));
      context.globalAlpha = this.kind.isStacked ? 0.28 : index ? 0.04 : 0.1;
      context.fill(line);
      context.globalAlpha = 1;
    }
  }

  hover(event) {
    if (!state) return;
    const place = this.canvas.getBoundingClientRect();
    const step = this.x(1) - this.x(0);
    const at = Math.round((event.clientX - place.left - this.x(0)) / step);
    if (at < 0 || at >= state.samples.length) { this.hovered = null; hideTip(); return this.draw(); }
    this.hovered = at;
    const sample = state.samples[at];
    const ago = (state.samples.length - 1 - at) * state.interval_s;
    const lines = this.kind.series.map(([name, read]) => `${name}  ${this.kind.format(read(sample))}`);
    showTip(event, [ago ? `${Math.round(ago)} s ago` : "now", ...lines].join("\n"));
    this.draw();
  }
}

// Stretches of a row without gaps.
function runs(row) {
  const found = [];
  let start = null;
  row.forEach((value, at) => {
    if (value !== null && start === null) start = at;
    if (value === null && start !== null) { found.push([start, at]); start = null; }
  });
  if (start !== null) found.push([start, row.length]);
  return found;
}

function showTip(event, text) {
  const tip = $("tip");
  tip.textContent = text;
  tip.hidden = false;
  const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
  tip.style.left = left + "px";
  tip.style.top = Math.max(8, event.clientY - tip.offsetHeight - 10) + "px";
}

function hideTip() { $("tip").hidden = true; }

// The last steps side by side: as wide as they took, as high as they had tokens (by their square root, so that a step
// of decodes can be seen beside one with a prompt). Idle times are cut short.

const STEPS_HEIGHT = 150, IDLE_SHARE = 0.02;
let boxes = [];

function placeSteps() {
  const steps = state.steps.map(([step, start_ms, end_ms, prompt, decoded]) =>
    ({ step, start_ms, end_ms, prompt, decoded }));
  const busy_ms = steps.reduce((sum, one) => sum + one.end_ms - one.start_ms, 0);
  let place_ms = 0;
  steps.forEach((one, index) => {
    const idle_ms = index ? Math.max(0, one.start_ms - steps[index - 1].end_ms) : 0;
    one.idle_ms = idle_ms;
    place_ms += Math.min(idle_ms, busy_ms * IDLE_SHARE);
    one.from = place_ms;
    place_ms += one.end_ms - one.start_ms;
    one.to = place_ms;
  });
  return [steps, place_ms];
}

function drawSteps() {
  const canvas = $("steps");
  const [context, width] = pen(canvas, STEPS_HEIGHT);
  const [steps, length_ms] = placeSteps();
  const base = STEPS_HEIGHT - BOTTOM;
  context.fillStyle = color("--line");
  context.fillRect(LEFT, base, width - LEFT - RIGHT, 1);
  boxes = steps;
  if (!steps.length) return;
  const most = Math.max(8, ...steps.map((one) => one.prompt + one.decoded));
  const height = (tokens) => (base - TOP) * Math.sqrt(tokens / most);
  const x = (at_ms) => LEFT + (width - LEFT - RIGHT) * at_ms / length_ms;
  for (const part of [0.25, 1]) {
    context.fillStyle = color("--line");
    context.fillRect(LEFT, Math.round(base - height(most * part)), width - LEFT - RIGHT, 1);
    context.fillStyle = color("--muted");
    context.textAlign = "right";
    context.fillText(count(Math.round(most * part)), LEFT - 6, base - height(most * part) + 4);
  }
  for (const one of steps) {
    const left = x(one.from), wide = Math.max(1, x(one.to) - left - (x(one.to) - left > 3 ? 1 : 0));
    const decoded = height(one.decoded), all = height(one.decoded + one.prompt);
    context.fillStyle = color("--second");
    context.fillRect(left, base - decoded, wide, decoded);
    context.fillStyle = color("--first");
    context.fillRect(left, base - all, wide, all - decoded);
    one.left = left;
    one.right = left + wide;
  }
  const busy_ms = steps.reduce((sum, one) => sum + one.end_ms - one.start_ms, 0);
  const last = steps[steps.length - 1];
  $("steps-text").textContent = `${steps.length} steps, ${duration(busy_ms / steps.length / 1000)} on average; ` +
    `the last one ${duration((state.now_ms - last.end_ms) / 1000)} ago`;
  context.fillStyle = color("--muted");
  context.textAlign = "left";
  context.fillText("tokens of a step; widths are durations, pauses are cut short", LEFT, STEPS_HEIGHT - 4);
}

$("steps").addEventListener("mousemove", (event) => {
  const at = event.clientX - $("steps").getBoundingClientRect().left;
  const one = boxes.find((box) => at >= box.left && at <= box.right + 1);
  if (!one) return hideTip();
  showTip(event, `step ${one.step}\n${duration((one.end_ms - one.start_ms) / 1000)}` +
    (one.idle_ms > 0.5 ? `, ${duration(one.idle_ms / 1000)} after the one before` : "") +
    `\n${one.prompt} prompt tokens\n${one.decoded} decoded tokens`);
});
$("steps").addEventListener("mouseleave", hideTip);

// Asking the server.

class KeyNeeded extends Error {}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey) headers.Authorization = "Bearer " + apiKey;
  const answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  if (answer.status === 401) {
    askForKey();
    throw new KeyNeeded("the server asks for an API key");
  }
  return answer;
}

function askForKey() {
  $("key-error").textContent = apiKey ? "The server does not know this key." : "";
  apiKey = "";
  sessionStorage.removeItem(KEY_NAME);
  setStatus("locked", "");
  if ($("key-form").hidden) {
    $("key-form").hidden = false;
    $("key").focus();
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey = $("key").value.trim();
  sessionStorage.setItem(KEY_NAME, apiKey);
  $("key").value = "";
  $("key-form").hidden = true;
  refresh();
});

function setStatus(text, kind) {
  $("status").textContent = text;
  $("status").className = "status " + kind;
}

const charts = CHARTS.map((kind) => new Chart(kind));
const tiles = TILES.map(([title]) => {
  const tile = element("div", "card tile");
  tile.append(element("span", "", title), element("b", "", "–"), element("span", "note", ""));
  $("numbers").append(tile);
  return tile;
});

function show() {
  document.title = state.model + " – text generation";
  $("model").textContent = state.model;
  $("about").textContent = `${state.device} · version ${state.version} · up ${uptime(state.uptime_s)}`;
  setStatus(state.is_healthy ? "healthy" : "unhealthy", state.is_healthy ? "good" : "bad");
  const last = state.samples[state.samples.length - 1];
  TILES.forEach(([, value, note], index) => {
    tiles[index].children[1].textContent = value(last);
    tiles[index].children[2].textContent = note(last);
  });
  charts.forEach((chart) => chart.draw());
  drawSteps();
}

async function refresh() {
  try {
    const answer = await ask("/ui/state");
    if (!answer.ok) throw new Error("status " + answer.status);
    state = await answer.json();
    show();
  } catch (error) {
    if (!(error instanceof KeyNeeded)) setStatus("no answer", "bad");
  }
}

function poll() {
  const isWaiting = !$("key-form").hidden;
  if (document.hidden || isWaiting) return setTimeout(poll, POLL_MS);
  refresh().finally(() => setTimeout(poll, POLL_MS));
}

window.addEventListener("resize", () => { if (state) show(); });

// Chat.

let messages = [];
let answering = null;

function addMessage(role, text) {
  const box = element("div", "message " + role);
  const thought = element("span", "thought"), said = element("span", "said", text), note = element("span", "note");
  box.append(thought, said, note);
  $("messages").append(box);
  box.scrollIntoView({ block: "end" });
  return { thought, said, note };
}

// The events of a stream, as objects.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.startsWith("data: ") ? block.slice(6) : "";
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function readAnswer(answer, shown, started) {
  let first = null, tokens = 0, text = "", reason = "";
  for await (const event of events(answer)) {
    if (event.error) throw new Error(event.error.message || event.error);
    if (event.usage) tokens = event.usage.completion_tokens;
    const choice = event.choices && event.choices[0];
    if (!choice) continue;
    if (first === null) first = performance.now();
    const { content, reasoning_content: thought } = choice.delta;
    if (thought) shown.thought.textContent += thought;
    if (content) { text += content; shown.said.textContent = text; }
    reason = choice.finish_reason || reason;
    $("messages").scrollTop = $("messages").scrollHeight;
  }
  const seconds = (performance.now() - first) / 1000;
  const speed = tokens > 1 && seconds > 0 ? ` · ${count((tokens - 1) / seconds)} tokens/s` : "";
  const cut = reason === "length" ? " · cut off by the limit" : "";
  shown.note.textContent = `${tokens} tokens · first after ${duration((first - started) / 1000)}${speed}${cut}`;
  return text;
}

async function send(text) {
  messages.push({ role: "user", content: text });
  addMessage("user", text);
  const shown = addMessage("assistant", "");
  answering = new AbortController();
  $("send").textContent = "Stop";
  $("send").classList.add("stop");
  const started = performance.now();
  try {
    const answer = await ask("/v1/chat/completions", {
      method: "POST",
      signal: answering.signal,
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        model: "tgi", messages, stream: true, stream_options: { include_usage: true },
        temperature: Number($("temperature").value), max_tokens: Number($("max-tokens").value),
      }),
    });
    if (!answer.ok) {
      const body = await answer.json().catch(() => ({}));
      throw new Error((body.error && body.error.message) || "status " + answer.status);
    }
    messages.push({ role: "assistant", content: await readAnswer(answer, shown, started) });
  } catch (error) {
    const isStopped = error.name === "AbortError";
    shown.note.textContent = isStopped ? "stopped" : error.message;
    if (!isStopped) shown.note.classList.add("error");
    if (shown.said.textContent) messages.push({ role: "assistant", content: shown.said.textContent });
    else messages.pop();
  }
  answering = null;
  $("send").textContent = "Send";
  $("send").classList.remove("stop");
}

$("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (answering) return answering.abort();
  const text = $("prompt").value.trim();
  if (!text) return;
  $("prompt").value = "";
  send(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!answering) $("chat-form").requestSubmit();
});
$("clear").addEventListener("click", () => {
  if (answering) answering.abort();
  messages = [];
  $("messages").replaceChildren();
});

poll();
