// The chat page: sends the conversation, shows the answer as it comes, what it cost and which experts wrote it. What a model
// or a person wrote only ever becomes text nodes.
"use strict";

const part = (id) => document.getElementById(id);
const conversation = part("conversation"), message = part("message");

let model = null; // what /v1/models tells of the model
let messages = []; // the conversation as requests carry it
let running = null; // the AbortController of the answer that is being written
let sum = { answers: 0, prompt: 0, cached: 0, completion: 0, cost: null };

// ---- the server ----

class Refused extends Error {
  constructor(status, error) {
    super(error?.message || `The server answers with HTTP ${status}.`);
    this.status = status;
    this.param = error?.param;
  }
}

async function ask(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new Refused(response.status, told?.error);
}

// The objects of a stream of server-sent events, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      held += done ? "\n\n" : value.replaceAll("\r", "");
      const blocks = held.split("\n\n");
      held = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n").filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
      if (done) throw new Error("The connection ended before the answer did.");
    }
  } finally {
    reader.cancel().catch(() => {}); // what is left is of no use
  }
}

async function connect() {
  try {
    const list = await (await ask("v1/models")).json();
    model = list.data[0];
    part("model").textContent = model.id;
    document.title = `${model.id} — moewe`;
    part("door").hidden = true;
    part("composer").hidden = false;
    strip.prepare(model.moewe);
    message.focus();
  } catch (error) {
    if (error.status === 401) {
      const key = part("key");
      part("refusal").textContent = sessionStorage.getItem("key") ? "This key is not known to the server." : "";
      part("door").hidden = false;
      part("composer").hidden = true;
      key.focus();
      key.select();
    } else if (error.status === 503) {
      part("welcome").textContent = "The model is being loaded …";
      setTimeout(connect, 1000);
      return;
    } else {
      part("welcome").textContent = error.message;
      return;
    }
  }
  part("welcome").textContent = "Write something to the model below.";
}

// ---- the strip of experts ----

const strip = {
  canvas: part("strip"),
  layers: 0, experts: 0,
  use: new Float32Array(0), // [layers, experts]: choices, each token weighing a little less than the one after it
  weight: 0, // of all tokens
  KEPT: 0.96, // of the weight, with each token: about the last 25 count
  queued: false,

  prepare(shape) {
    this.layers = shape?.moe_layers ?? 0;
    this.experts = shape?.experts ?? 0;
    part("watch").closest("label").hidden = !this.layers;
    this.canvas.width = Math.max(this.experts, 1);
    this.canvas.height = Math.max(this.layers, 1);
    this.canvas.style.height = `${Math.min(Math.max(this.layers * 8, 24), 160)}px`;
    this.clear();
  },
  wanted() { return this.layers > 0 && part("watch").checked; },
  clear() {
    this.use = new Float32Array(this.layers * this.experts);
    this.weight = 0;
    part("experts").hidden = !this.wanted();
    this.draw();
  },
  // Takes `[tokens, layers, k]` ids.
  take(tokens) {
    for (const layers of tokens ?? []) {
      for (let i = 0; i < this.use.length; i++) this.use[i] *= this.KEPT;
      this.weight = this.weight * this.KEPT + 1;
      layers.slice(0, this.layers).forEach((ids, layer) => {
        for (const id of ids) if (id < this.experts) this.use[layer * this.experts + id] += 1;
      });
    }
    if (tokens?.length && !this.queued) {
      this.queued = true;
      requestAnimationFrame(() => { this.queued = false; this.draw(); });
    }
  },
  share(layer, expert) { return this.weight ? this.use[layer * this.experts + expert] / this.weight : 0; },
  draw() {
    if (!this.use.length) return;
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim().match(/[0-9a-f]{2}/gi).map((two) => parseInt(two, 16));
    const from = colour("--unused"), to = colour("--used");
    const image = new ImageData(this.experts, this.layers);
    for (let i = 0; i < this.use.length; i++) {
      const light = this.weight ? (this.use[i] / this.weight) ** 0.75 : 0; // what is rare is to be seen, too
      for (let c = 0; c < 3; c++) image.data[i * 4 + c] = from[c] + (to[c] - from[c]) * light;
      image.data[i * 4 + 3] = 255;
    }
    this.canvas.getContext("2d").putImageData(image, 0, 0);
  },
  // In words, for those who do not see it.
  tell() {
    const busiest = [...Array(this.layers).keys()].map((layer) => {
      const experts = [...Array(this.experts).keys()].sort((a, b) => this.share(layer, b) - this.share(layer, a));
      return `layer ${layer + 1} expert ${experts[0]} (${percent(this.share(layer, experts[0]))})`;
    });
    const more = busiest.length > 4 ? " and so on" : "";
    this.canvas.setAttribute("aria-label", `Recent use of experts, the busiest: ${busiest.slice(0, 4).join(", ")}${more}`);
  },
};
const percent = (share) => `${Math.round(share * 100)} %`;
const LEGEND = part("hover").textContent;

strip.canvas.addEventListener("pointermove", (event) => {
  const box = strip.canvas.getBoundingClientRect();
  const at = (x, from, size, count) => Math.min(Math.max(Math.floor((x - from) / size * count), 0), count - 1);
  const layer = at(event.clientY, box.top, box.height, strip.layers);
  const expert = at(event.clientX, box.left, box.width, strip.experts);
  part("hover").textContent =
    `expert layer ${layer + 1} of ${strip.layers}, expert ${expert}: ${percent(strip.share(layer, expert))} of recent tokens`;
});
strip.canvas.addEventListener("pointerleave", () => { part("hover").textContent = LEGEND; });
part("watch").addEventListener("change", () => { part("experts").hidden = !strip.wanted(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => strip.draw());

// ---- the conversation ----

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

// Adds something to the conversation, which stays at its end if it is there.
function show(change) {
  const is_at_end = conversation.scrollHeight - conversation.scrollTop - conversation.clientHeight < 40;
  change();
  if (is_at_end) conversation.scrollTop = conversation.scrollHeight;
}

function say(role, label) {
  const article = element("article", role);
  article.setAttribute("aria-label", label);
  show(() => { part("welcome").hidden = true; conversation.append(article); });
  return article;
}

// An answer while it comes.
class Answer {
  constructor() {
    this.article = say("assistant", "Answer");
    this.article.classList.add("writing");
    this.article.setAttribute("aria-busy", "true");
    this.text = document.createTextNode("");
    const text = element("div", "text");
    text.append(this.text);
    this.article.append(text);
    this.began = performance.now();
  }
  think(text) {
    if (!this.thoughts) {
      const fold = element("details", "reasoning");
      this.title = element("summary", "", "Thinking …");
      const box = element("div");
      this.thoughts = document.createTextNode("");
      box.append(this.thoughts);
      fold.append(this.title, box);
      this.article.prepend(fold);
    }
    show(() => this.thoughts.appendData(text));
  }
  thought() {
    if (!this.title || this.seconds) return;
    this.seconds = ((performance.now() - this.began) / 1000).toFixed(1);
    this.title.textContent = `Thought for ${this.seconds} s`;
  }
  write(text) {
    this.thought();
    show(() => this.text.appendData(text));
  }
  account(usage, reason) {
    this.thought();
    const seconds = (performance.now() - this.first) / 1000;
    const words = [];
    if (usage) {
      const cached = usage.prompt_cache_hit_tokens ?? usage.prompt_tokens_details?.cached_tokens ?? 0;
      const reasoning = usage.completion_tokens_details?.reasoning_tokens;
      words.push(`prompt ${usage.prompt_tokens} (cached ${cached})`);
      words.push(`answer ${usage.completion_tokens}` + (reasoning ? ` (reasoning ${reasoning})` : ""));
      if (usage.completion_tokens > 1 && seconds > 0) {
        words.push(`${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s`);
      }
      if (usage.cost != null) words.push(`cost ${money(usage.cost)}`);
      add(usage, cached);
    }
    words.push(REASONS[reason] ?? reason ?? "unfinished");
    show(() => this.article.append(element("p", "account", words.join(" · "))));
  }
  fail(text) {
    const problem = element("p", "problem", text);
    problem.setAttribute("role", "alert");
    show(() => this.article.append(problem));
  }
  end() {
    this.article.classList.remove("writing");
    this.article.removeAttribute("aria-busy");
  }
}

const REASONS = {
  stop: "complete", length: "cut off at the limit of tokens", stopped: "stopped; the server does not tell what it cost until then",
  insufficient_system_resource: "ended by the server for want of room",
};

// A sum in the unit of the server's prices, with as many digits as say something.
const money = (amount) => (amount >= 1 ? amount.toFixed(2) : amount === 0 ? "0" : amount.toPrecision(3));

function add(usage, cached) {
  sum.answers += 1;
  sum.prompt += usage.prompt_tokens;
  sum.cached += cached;
  sum.completion += usage.completion_tokens;
  if (usage.cost != null) sum.cost = (sum.cost ?? 0) + usage.cost;
  const cost = sum.cost == null ? "" : ` · cost ${money(sum.cost)}`;
  part("sum").textContent = `in all: prompt ${sum.prompt} (cached ${sum.cached}) · answers ${sum.completion}${cost}`;
}

function request(watched) {
  const system = part("system").value.trim();
  const body = { model: model.id, messages: system ? [{ role: "system", content: system }, ...messages] : messages };
  for (const name of ["temperature", "max_tokens", "seed"]) {
    const value = part(name).value;
    if (value !== "") body[name] = Number(value);
  }
  if (watched) body.routed_experts = true;
  return { ...body, stream: true, stream_options: { include_usage: true } };
}

async function read(answer, signal) {
  let response;
  try {
    response = await ask("v1/chat/completions", request(strip.wanted()), signal);
  } catch (error) {
    // Not every model was made ready to be watched.
    if (error.param !== "routed_experts") throw error;
    part("watch").checked = false;
    part("experts").hidden = true;
    response = await ask("v1/chat/completions", request(false), signal);
  }
  let reason, usage;
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message ?? "The server failed.");
    answer.first ??= performance.now();
    usage = event.usage ?? usage;
    strip.take(event.prompt_routed_experts);
    for (const choice of event.choices ?? []) {
      strip.take(choice.routed_experts);
      if (choice.delta?.reasoning_content) answer.think(choice.delta.reasoning_content);
      if (choice.delta?.content) answer.write(choice.delta.content);
      reason = choice.finish_reason ?? reason;
    }
  }
  return { reason, usage };
}

async function send() {
  const text = message.value;
  if (running || !model || !text.trim()) return;
  message.value = "";
  say("user", "You").append(element("div", "text", text));
  conversation.scrollTop = conversation.scrollHeight;
  messages.push({ role: "user", content: text });
  const answer = new Answer(), here = messages;
  running = new AbortController();
  part("send").hidden = true;
  part("stop").hidden = false;
  try {
    const { reason, usage } = await read(answer, running.signal);
    answer.account(usage, reason);
  } catch (error) {
    if (error.name === "AbortError") {
      answer.account(null, "stopped");
    } else {
      answer.fail(error.message);
      if (error.status === 401) connect();
    }
  }
  answer.end();
  if (here !== messages) {
    // A new conversation has begun meanwhile.
  } else if (answer.text.data) {
    here.push({ role: "assistant", content: answer.text.data });
  } else {
    here.pop(); // without an answer it was not said
    if (!message.value) message.value = text;
  }
  running = null;
  part("send").hidden = false;
  part("stop").hidden = true;
  strip.tell();
  message.focus();
}

// ---- hands ----

part("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
part("stop").addEventListener("click", () => running?.abort());
part("anew").addEventListener("click", () => {
  running?.abort();
  messages = [];
  conversation.querySelectorAll("article").forEach((article) => article.remove());
  part("welcome").hidden = false;
  strip.clear();
  message.focus();
});
part("door").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", part("key").value.trim());
  part("key").value = "";
  connect();
});

connect();
