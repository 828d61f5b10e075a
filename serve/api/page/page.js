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
const unusable = []; // what the address bar has that cannot be used, as name=value
const latest = { digits: 0, strip: 0 }; // numbers of the last drawings asked for: an older answer is thrown away

const said = { address: "", status: "", digits: "", strip: "" };

// What is wrong with one of them, or "" when nothing is any more: that says nothing of the others.
function say(of, text) {
  said[of] = text;
  const texts = new Set(Object.values(said));
  at("message").textContent = [...texts].filter(Boolean).join(" ");
  at("message").hidden = !at("message").textContent;
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
  const turn = ++latest.digits;
  const asked = { ...chosen(), start: at("start").value, count: at("count").value };
  try {
    const answer = await ask("v1/digits", asked);
    if (turn !== latest.digits) return;
    keepAddress(asked);
    say("digits", "");
    if (!first) say("address", "");
    first = false;
    at("digits").replaceChildren(...answer.digits.map((digit) => tile(answer, digit, asked)));
  } catch (error) {
    if (turn === latest.digits) say("digits", error.message);
  }
}

// Only what was answered is kept: a value that was refused would be refused again by whoever opens the address.
function keepAddress(answered) {
  const kept = new URLSearchParams(location.search);
  for (const [name, value] of Object.entries(answered)) {
    if (value === "") kept.delete(name);
    else kept.set(name, value);
  }
  history.replaceState(null, "", `?${kept}`);
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
  if (location.protocol === "https:") words.push("--ca FILE");
  if (at("token").value) words.push("--token-file FILE");
  return words.join(" ");
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    at("copied").textContent = `copied: ${text}`;
    at("where").hidden = false;
  } catch {
    at("copied").textContent = text; // no clipboard for pages over plain HTTP from elsewhere: it can be copied by hand
  }
}

async function interpolate() {
  if (!at("ends").reportValidity()) return;
  const turn = ++latest.strip;
  const { seed, ...rest } = chosen();
  const [begin, end] = [at("begin").value, at("end").value];
  const asked = { ...rest, seed, start: begin, to_seed: seed, to_start: end, steps: STEPS };
  try {
    let answer = await ask("v1/interpolation", asked);
    const label = answer.digits[0].label;
    // There is nothing between two labels: a strip from a six to a three would be sixes and then threes.
    if (answer.digits.some((digit) => digit.label !== label)) answer = await ask("v1/interpolation", { ...asked, labels: label });
    if (turn !== latest.strip) return;
    say("strip", "");
    keepAddress({ begin, end });
    at("strip").replaceChildren(...answer.digits.map((digit, step) => picture(digit, `step ${step}`)));
  } catch (error) {
    if (turn === latest.strip) say("strip", error.message);
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
  target = status.grpc.replace(/^(0\.0\.0\.0|\[::\]):/, `${location.hostname}:`); // what listens everywhere is no address to call
  const served = new Map();
  for (const model of status.models) {
    const known = served.get(model.name) || { labels: model.labels, versions: [] };
    known.versions.push(model.version);
    served.set(model.name, known);
  }
  if (JSON.stringify([...served]) === JSON.stringify([...models])) return;
  const opened = !models.size;
  models = served;
  choose("model", [...served.keys()].map((name) => new Option(name, name)), opened, status.default_model);
  offerOfModel(opened);
}

// Offer other options in a list: what was chosen stays, and when the page was opened what its address says is chosen, or else the default.
function choose(name, options, opened, otherwise = "", parameter = name) {
  const given = opened ? new URLSearchParams(location.search).get(parameter) : null;
  const wanted = given || at(name).value;
  const known = options.some((option) => option.value === wanted);
  if (given && !known) unusable.push(`${parameter}=${given}`);
  at(name).replaceChildren(...options);
  at(name).value = known ? wanted : otherwise;
}

function offerOfModel(opened) {
  const model = models.get(at("model").value) || { versions: [], labels: 0 };
  const versions = model.versions.map((version) => new Option(version, version));
  choose("version", [new Option("the server's choice", ""), ...versions], opened);
  const labels = Array.from({ length: model.labels }, (_, label) => new Option(label, label));
  choose("digit", [new Option("any", ""), ...labels], opened, "", "labels");
  at("digit").disabled = !model.labels;
}

async function watch() {
  try {
    const status = await ask("v1/status");
    const opened = !models.size;
    offer(status);
    if (opened && unusable.length) {
      say("address", `The address of this page has values that cannot be used: ${unusable.join(", ")}. The fields show what is used instead.`);
    }
    showStatus(status, performance.now());
    const back = at("message").textContent.includes("cannot be reached");
    say("status", "");
    if (opened || back) await drawAll();
  } catch (error) {
    say("status", error.message);
    showNothing();
  }
  setTimeout(watch, STATUS_MS);
}

async function drawAll() {
  if (!models.size) return; // the status draws when it comes: only then is it known what to ask for, and where
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
  for (const name of ["seed", "start", "count", "truncation", "begin", "end"]) {
    const value = given.get(name);
    if (value && !take(name, value)) unusable.push(`${name}=${value}`);
  }
  const showTruncation = () => {
    const value = at("truncation").value;
    at("truncation-shown").textContent = Number(value) >= NO_TRUNCATION ? "none" : value;
  };
  showTruncation();
  at("truncation").addEventListener("input", showTruncation);
  for (const id of ["version", "digit", "seed", "start", "count", "truncation", "token"]) at(id).addEventListener("change", drawAll);
  at("model").addEventListener("change", () => { offerOfModel(false); drawAll(); });
  at("another").addEventListener("click", () => { anotherSeed(); drawAll(); });
  at("controls").addEventListener("submit", (event) => { event.preventDefault(); drawAll(); });
  at("ends").addEventListener("submit", (event) => { event.preventDefault(); interpolate(); });
  watch();
}

begin();
