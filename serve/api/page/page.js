// The page: controls in, pictures out. Every request is a GET to this server; nothing is kept but what the address bar shows.
"use strict";

const STEPS = 11;
const STATUS_MS = 1000;
const NO_TRUNCATION = 2.5; // the slider's end

const at = (id) => document.getElementById(id);
let models = new Map();
let target = "";
let before = null; // the last status, for rates
let first = true; // what is said of the address bar stays until something is changed
let latest = 0; // number of the last drawing asked for: an older answer is thrown away

function say(text) {
  at("message").textContent = text;
  at("message").hidden = !text;
}

async function ask(path, parameters = {}) {
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== ""));
  const token = at("token").value;
  let answer;
  try {
    answer = await fetch(`${path}?${query}`, token ? { headers: { Authorization: `Bearer ${token}` } } : {});
  } catch {
    throw new Error("The server cannot be reached. This page goes on trying.");
  }
  if (answer.status === 401) {
    at("token-field").hidden = false;
    throw new Error(token ? "The server does not take this token." : "The server asks for a token: give it in the field that has come up.");
  }
  const content = await answer.json().catch(() => ({ error: `status ${answer.status}` }));
  if (!answer.ok) {
    const wait = answer.headers.get("Retry-After");
    throw new Error(`The server refuses: ${content.error}${wait ? ` (try again in ${wait} s)` : ""}`);
  }
  return content;
}

function chosen() {
  const truncation = at("truncation").value;
  return {
    model: at("model").value,
    version: at("version").value,
    seed: at("seed").value,
    labels: at("digit").disabled ? "" : at("digit").value,
    truncation: Number(truncation) >= NO_TRUNCATION ? "" : truncation,
  };
}

async function draw() {
  if (!at("controls").reportValidity()) return;
  const turn = ++latest;
  const asked = { ...chosen(), start: at("start").value, count: at("count").value };
  keepAddress(asked);
  try {
    const answer = await ask("v1/digits", asked);
    if (turn !== latest) return;
    if (!first) say("");
    first = false;
    at("digits").replaceChildren(...answer.digits.map((digit) => tile(answer, digit, asked)));
  } catch (error) {
    if (turn === latest) say(error.message);
  }
}

function keepAddress(asked) {
  const shown = { ...asked, begin: at("begin").value, end: at("end").value };
  history.replaceState(null, "", `?${new URLSearchParams(Object.entries(shown).filter(([, value]) => value !== ""))}`);
}

function tile(answer, digit, asked) {
  const button = document.createElement("button");
  const label = digit.label === null ? "" : `${digit.label} · `;
  const caption = document.createElement("span");
  caption.textContent = `${label}${digit.index}`;
  button.type = "button";
  button.title = `seed ${answer.seed}, index ${digit.index}`;
  button.append(picture(digit, button.title), caption);
  button.addEventListener("click", () => copy(call(answer, digit, asked)));
  return button;
}

function picture(digit, text) {
  const image = document.createElement("img");
  image.src = `data:image/png;base64,${digit.png}`;
  image.alt = digit.label === null ? text : `a ${digit.label}, ${text}`;
  image.width = image.height = 28;
  return image;
}

function call(answer, digit, asked) {
  const words = ["python -m serve.client", `--target ${target}`, `--model ${answer.model}`, `--version ${answer.version}`];
  words.push(`--seed ${answer.seed}`, `--start ${digit.index}`, "--count 1");
  if (digit.label !== null) words.push(`--digit ${digit.label}`);
  if (asked.truncation) words.push(`--truncation ${asked.truncation}`);
  return words.join(" ");
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    at("copied").textContent = `copied: ${text}`;
  } catch {
    at("copied").textContent = text; // no clipboard for pages over plain HTTP from elsewhere: it can be copied by hand
  }
}

async function interpolate() {
  if (!at("ends").reportValidity()) return;
  const { seed, ...rest } = chosen();
  keepAddress({ ...chosen(), start: at("start").value, count: at("count").value });
  try {
    const ends = { seed, start: at("begin").value, to_seed: seed, to_start: at("end").value };
    const answer = await ask("v1/interpolation", { ...rest, ...ends, steps: STEPS });
    at("strip").replaceChildren(...answer.digits.map((digit, step) => picture(digit, `step ${step}`)));
  } catch (error) {
    say(error.message);
  }
}

function showStatus(status, now) {
  if (before) {
    const seconds = (now - before.now) / 1000;
    const calls = status.calls_total - before.calls_total;
    const rate = Math.max(0, status.images_total - before.images_total) / seconds;
    at("rate").textContent = Math.round(rate).toLocaleString("en");
    if (calls > 0) at("latency").textContent = `${(((status.seconds_total - before.seconds_total) / calls) * 1000).toFixed(1)} ms`;
  }
  before = { ...status, now };
  const own = status.models.find((model) => model.name === at("model").value && isChosen(model.version)) || status.models[0];
  at("queue").textContent = own ? `${own.queued_images}` : "–";
  at("provider").textContent = own ? (own.ready ? own.provider : `${own.provider}, not ready`) : "–";
}

function showNothing() {
  before = null;
  for (const id of ["rate", "latency", "queue", "provider"]) at(id).textContent = "–";
}

function isChosen(version) {
  return !at("version").value || Number(at("version").value) === version;
}

function offer(status) {
  target = status.grpc;
  const served = new Map();
  for (const model of status.models) {
    const known = served.get(model.name) || { labels: model.labels, versions: [] };
    known.versions.push(model.version);
    served.set(model.name, known);
  }
  if (JSON.stringify([...served]) === JSON.stringify([...models])) return;
  const kept = at("model").value || new URLSearchParams(location.search).get("model") || status.default_model;
  models = served;
  at("model").replaceChildren(...[...served.keys()].map((name) => new Option(name, name)));
  at("model").value = served.has(kept) ? kept : status.default_model;
  offerOfModel();
}

function offerOfModel() {
  const model = models.get(at("model").value);
  const versions = model ? model.versions.map(String) : [];
  const wanted = at("version").value || new URLSearchParams(location.search).get("version") || "";
  at("version").replaceChildren(new Option("as routed", ""), ...versions.map((version) => new Option(version, version)));
  at("version").value = versions.includes(wanted) ? wanted : "";
  const kept = at("digit").value || new URLSearchParams(location.search).get("labels") || "";
  const labels = model ? model.labels : 0;
  at("digit").replaceChildren(new Option("any", ""), ...Array.from({ length: labels }, (_, label) => new Option(label, label)));
  at("digit").value = Number(kept) < labels ? kept : "";
  at("digit").disabled = !labels;
}

async function watch() {
  try {
    const status = await ask("v1/status");
    const first = !models.size;
    offer(status);
    showStatus(status, performance.now());
    if (first || at("message").textContent.includes("cannot be reached")) await drawAll();
  } catch (error) {
    say(error.message);
    showNothing();
  }
  setTimeout(watch, STATUS_MS);
}

async function drawAll() {
  await Promise.all([draw(), interpolate()]);
}

function anotherSeed() {
  at("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
}

// A value of the address bar into its field; false, and the field stays as it was, when it cannot be one.
function take(name, value) {
  const field = at(name);
  const kept = field.value;
  field.value = value;
  if (field.checkValidity() && field.value === value) return true;
  field.value = kept;
  return false;
}

function begin() {
  const given = new URLSearchParams(location.search);
  anotherSeed();
  const odd = ["seed", "start", "count", "truncation", "begin", "end"].filter((name) => given.get(name) && !take(name, given.get(name)));
  if (odd.length) say(`The address of this page has no usable ${odd.join(", ")}; what is shown instead is in the fields.`);
  const showTruncation = () => {
    const value = at("truncation").value;
    at("truncation-shown").textContent = Number(value) >= NO_TRUNCATION ? "none" : value;
  };
  showTruncation();
  at("truncation").addEventListener("input", showTruncation);
  for (const id of ["version", "digit", "seed", "start", "count", "truncation", "token"]) at(id).addEventListener("change", drawAll);
  at("model").addEventListener("change", () => { offerOfModel(); drawAll(); });
  at("another").addEventListener("click", () => { anotherSeed(); drawAll(); });
  at("controls").addEventListener("submit", (event) => { event.preventDefault(); drawAll(); });
  at("ends").addEventListener("submit", (event) => { event.preventDefault(); interpolate(); });
  watch();
}

begin();
