"use strict";
// Every text of a rollout reaches the page as textContent, never as markup.

const ROW = 68; // pixels, as in the style sheet
const TALLEST = 8e6; // pixels of the list: browsers limit the height of an element
const FIRST = 35; // numbers written as characters start here
const KEPT = 60; // decompressed blocks of texts
const form = document.getElementById("filters");
const list = document.getElementById("list");
const space = document.getElementById("space");
const detail = document.getElementById("detail");
const said = document.getElementById("said");

let about, columns, shown = [], chosen = -1, onePrompt = -1, request = 0;
const blocks = new Map();

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Characters that act on a page without being seen, as escapes; the terminal commands show the same.
function visible(text) {
  return text.replace(/[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]/gu,
    (found) => "\\u" + found.charCodeAt(0).toString(16).padStart(4, "0"));
}

async function inflate(id) {
  const binary = atob(document.getElementById(id).textContent);
  const bytes = Uint8Array.from({ length: binary.length }, (_, i) => binary.charCodeAt(i));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

const readJson = async (id) => JSON.parse(new TextDecoder().decode(await inflate(id)));

// A block of prompts (p), texts (t) or what only a chosen rollout shows (d): one list per field. The blocks used last are kept.
function block(kind, row) {
  const id = kind + Math.floor(row / about.block);
  let found = blocks.get(id);
  if (found) blocks.delete(id);
  else found = { value: null, promise: readJson(id).then((value) => (found.value = value)) };
  blocks.set(id, found);
  if (blocks.size > KEPT) blocks.delete(blocks.keys().next().value);
  return found;
}

function field(kind, row, number) {
  const found = block(kind, row);
  if (found.value) return found.value[number][row % about.block];
  found.promise.then(soon);
  return null;
}

// ---- numbers

function readColumns(buffer) {
  const types = { i: Int32Array, f: Float32Array, B: Uint8Array };
  let offset = 0;
  columns = {};
  for (const [name, code] of about.columns) {
    columns[name] = new types[code](buffer, offset, about.count);
    offset += columns[name].byteLength;
  }
}

const shortNumber = (x, signed) =>
  Number.isNaN(x) ? "none" : (signed && x > 0 ? "+" : "") + (Math.abs(x) >= 1000 ? x.toFixed(0) : x.toFixed(3));
const count = (n) => n.toLocaleString("en");
const signOf = (x) => (x > 0 ? "+" : x < 0 ? "-" : x === 0 ? "0" : "");

// ---- filter

function settings() {
  const given = Object.fromEntries(new FormData(form));
  const number = (name, otherwise) => (given[name] === "" || given[name] === undefined ? otherwise : Number(given[name]));
  return { ...given, number };
}

function candidates(given) {
  const { step, length, advantage, status, finish, run, prompt } = columns;
  const reward = columns[given.reward];
  const bounded = given.reward_from !== "" || given.reward_to !== "";
  const [s0, s1] = [given.number("step_from", -Infinity), given.number("step_to", Infinity)];
  const [r0, r1] = [given.number("reward_from", -Infinity), given.number("reward_to", Infinity)];
  const [l0, l1] = [given.number("length_from", -Infinity), given.number("length_to", Infinity)];
  const ofRun = given.run ? Number(given.run) : -1;
  const ofStatus = given.status ? 1 << Number(given.status) : 0;
  const ofFinish = given.finish ? Number(given.finish) : -1;
  const close = 1e-6; // numbers are kept as float32
  const found = new Uint32Array(about.count);
  let n = 0;
  for (let i = 0; i < about.count; i++) {
    if (step[i] < s0 || step[i] > s1 || length[i] < l0 || length[i] > l1) continue;
    if (bounded && !(reward[i] >= r0 - close && reward[i] <= r1 + close)) continue;
    if (ofRun >= 0 && run[i] !== ofRun) continue;
    if (onePrompt >= 0 && prompt[i] !== onePrompt) continue;
    if (ofStatus && !(status[i] & ofStatus)) continue;
    if (ofFinish >= 0 && finish[i] !== ofFinish) continue;
    if (given.sign && signOf(advantage[i]) !== given.sign) continue;
    found[n++] = i;
  }
  return found.subarray(0, n);
}

async function withText(rows, wanted, mine) {
  const needle = wanted.toLowerCase();
  const fits = new Uint8Array(about.prompts);
  for (let p = 0; p < about.prompts; p += about.block) {
    const [texts] = await block("p", p).promise;
    texts.forEach((text, i) => (fits[p + i] = text.toLowerCase().includes(needle)));
    if (mine !== request) return null;
  }
  const found = new Uint32Array(rows.length);
  let n = 0, last = -1, texts = null;
  for (const row of rows) {
    const number = Math.floor(row / about.block);
    if (number !== last) {
      const fields = await block("t", row).promise;
      if (mine !== request) return null;
      [texts, last] = [fields, number];
      said.textContent = `Searching … ${Math.round((100 * number * about.block) / about.count)}%`;
    }
    const at = row % about.block;
    const text = texts[2][at] ?? texts[0][at];
    if (fits[columns.prompt[row]] || text.toLowerCase().includes(needle)) found[n++] = row;
  }
  return found.subarray(0, n);
}

function ordered(rows, order) {
  if (onePrompt >= 0 && !order) return Array.from(rows).sort((a, b) => columns.step[a] - columns.step[b] || a - b);
  if (!order) return rows;
  const [column, up] = [columns[order.slice(0, -1)], order.endsWith("+") ? 1 : -1];
  const last = (x) => (Number.isNaN(x) ? Infinity : up * x);
  return Uint32Array.from(rows).sort((a, b) => last(column[a]) - last(column[b]) || a - b);
}

// Rows of the view of two runs: [left, right], and {prompt} above the rollouts of a prompt.
function paired(rows) {
  const sides = new Map();
  for (const row of rows) {
    const prompt = columns.prompt[row];
    if (!sides.has(prompt)) sides.set(prompt, [[], []]);
    sides.get(prompt)[columns.run[row]].push(row);
  }
  const found = [];
  for (const [prompt, [a, b]] of sides) {
    if (!a.length || !b.length) continue;
    const byStep = (x, y) => columns.step[x] - columns.step[y] || x - y;
    if (!form.elements.order.value) [a, b].forEach((side) => side.sort(byStep));
    found.push({ prompt });
    for (let i = 0; i < Math.max(a.length, b.length); i++) found.push([a[i] ?? -1, b[i] ?? -1]);
  }
  return found;
}

async function apply() {
  const mine = ++request;
  const given = settings();
  let rows = candidates(given);
  if (given.text) rows = await withText(rows, given.text, mine);
  if (mine !== request || rows === null) return;
  const mean = meanOf(rows, given.reward);
  const pairs = given.view === "pairs" && about.runs.length === 2;
  shown = pairs ? paired(rows) : ordered(rows, given.order);
  const common = pairs ? `, ${count(shown.filter((row) => !Array.isArray(row)).length)} prompts in both` : "";
  said.textContent = `${count(rows.length)} of ${count(about.count)} rollouts, mean ${shortNumber(mean)}${common}`;
  const none = document.getElementById("none");
  none.hidden = shown.length > 0;
  none.textContent = pairs && rows.length ? "No prompt of these rollouts is in both runs." : "No rollout fits this filter.";
  document.getElementById("one").hidden = onePrompt < 0;
  space.style.height = `${Math.min(shown.length * ROW, TALLEST)}px`;
  list.scrollTop = 0;
  drawCurve(rows, given.reward);
  draw();
  document.body.dataset.ready = "yes";
}

function meanOf(rows, name) {
  const column = columns[name];
  let [sum, n] = [0, 0];
  for (const row of rows) if (!Number.isNaN(column[row])) [sum, n] = [sum + column[row], n + 1];
  return n ? sum / n : NaN;
}

function drawCurve(rows, name) {
  const curve = document.getElementById("curve");
  const sums = about.runs.map(() => new Map());
  for (const row of rows) {
    const value = columns[name][row];
    if (Number.isNaN(value)) continue;
    const [of, step] = [sums[columns.run[row]], columns.step[row]];
    const sum = of.get(step);
    if (sum) (sum[0] += value), (sum[1] += 1);
    else of.set(step, [value, 1]);
  }
  const points = sums.map((of) => [...of].map(([step, [sum, n]]) => [step, sum / n]).sort((a, b) => a[0] - b[0]));
  const [steps, means] = [points.flat().map((p) => p[0]), points.flat().map((p) => p[1])];
  const range = (values) => values.reduce(([a, b], x) => [Math.min(a, x), Math.max(b, x)], [Infinity, -Infinity]);
  const [[x0, x1], [y0, y1]] = [range(steps), range(means)];
  const drawn = points.filter((of) => of.length).map((of) => {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    if (points.indexOf(of) === 1) line.setAttribute("class", "b");
    const at = ([x, y]) => `${x1 > x0 ? (100 * (x - x0)) / (x1 - x0) : 50},${y1 > y0 ? 42 - (40 * (y - y0)) / (y1 - y0) : 22}`;
    line.setAttribute("points", of.map(at).join(" "));
    return line;
  });
  curve.replaceChildren(...drawn);
  const scale = document.getElementById("scale");
  scale.replaceChildren();
  if (!steps.length) return;
  const middle = element("span", "", `mean ${label(name)}, ${shortNumber(y0)} to ${shortNumber(y1)}`);
  if (about.runs.length === 2) about.runs.forEach((run, i) => middle.append(element("span", i ? "key b" : "key", visible(run))));
  scale.append(element("span", "", `step ${x0}`), middle, element("span", "", `${x1}`));
}

const label = (name) => (name === "total" ? "reward" : visible(name.replace(/^reward /, "")));

// ---- the list: only the rows in sight are in the page

let waiting = false;
function soon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => ((waiting = false), draw()));
}

// The list is at most TALLEST pixels high: where it is scaled, the position within it says which row is on top.
function scrolled() {
  const [height, view] = [shown.length * ROW, list.clientHeight];
  if (height <= TALLEST) return list.scrollTop;
  return (list.scrollTop / Math.max(1, TALLEST - view)) * (height - view);
}

function draw() {
  if (!about) return;
  const at = scrolled();
  const first = Math.max(0, Math.floor(at / ROW) - 2);
  const end = Math.min(shown.length, Math.ceil((at + list.clientHeight) / ROW) + 2);
  const rows = [];
  for (let i = first; i < end; i++) {
    const made = typeof shown[i] === "number" ? oneRow(shown[i]) : pairRow(shown[i]);
    made.style.top = `${i * ROW - at + list.scrollTop}px`;
    rows.push(made);
  }
  space.replaceChildren(...rows);
}

function oneRow(row) {
  const made = element("div", row === chosen ? "row on" : "row");
  made.setAttribute("role", "listitem");
  made.append(facts(row), textOf(row));
  made.addEventListener("click", () => choose(row));
  return made;
}

function pairRow(pair) {
  if (!Array.isArray(pair)) {
    const made = element("div", "head");
    const prompt = field("p", pair.prompt, 0) ?? "";
    const text = element("div", "text", (prompt.length > 180 ? "…" : "") + visible(prompt.slice(-180)));
    text.dir = "auto";
    made.append(text);
    return made;
  }
  const made = element("div", "row pair");
  made.setAttribute("role", "listitem");
  for (const row of pair) {
    const half = element("div", row >= 0 && row === chosen ? "half on" : "half");
    if (row >= 0) {
      half.append(facts(row), textOf(row));
      half.addEventListener("click", () => choose(row));
    }
    made.append(half);
  }
  return made;
}

// What is said of a rollout in one line: its numbers, and the end of its prompt.
function facts(row) {
  const made = element("div", "facts");
  const advantage = columns.advantage[row];
  made.append(element("b", "", shortNumber(columns.total[row])));
  made.append(element("span", advantage > 0 ? "up" : advantage < 0 ? "down" : "", shortNumber(advantage, true)));
  made.append(element("span", "", `step ${columns.step[row]}`), element("span", "", `${columns.length[row]} tokens`));
  const finish = about.finish[columns.finish[row]];
  if (finish === "length") made.append(element("span", "cut", "cut"));
  for (const status of statuses(row)) if (status !== "ok") made.append(element("span", "cut", visible(status)));
  if (about.runs.length === 2) made.append(element("span", columns.run[row] ? "key b" : "key", visible(about.runs[columns.run[row]])));
  const prompt = field("p", columns.prompt[row], 0);
  if (prompt !== null && settings().view !== "pairs") made.append(element("span", "end", visible(prompt.trim().split("\n").pop().slice(0, 200))));
  return made;
}

const statuses = (row) => about.status.filter((_, i) => columns.status[row] & (1 << i));

function textOf(row) {
  const text = field("t", row, 2) ?? field("t", row, 0);
  const made = element("div", text === "" ? "text muted" : "text", text === null ? "…" : visible(text) || "(empty)");
  made.dir = "auto";
  return made;
}

// ---- one rollout in full

async function choose(row) {
  chosen = row;
  detail.classList.add("open");
  draw();
  const read = [block("t", row), block("d", row), block("p", columns.prompt[row])].map((found) => found.promise);
  const [texts, more, prompts] = await Promise.all(read);
  if (chosen !== row) return;
  const at = (fields, number) => fields.map((values) => values[number % about.block]);
  const [completion, raw, messages] = at(texts, row);
  const [lengths, logprobs, status, details] = at(more, row);
  const [prompt, references] = at(prompts, columns.prompt[row]);
  const close = element("button", "", "Close");
  close.id = "close";
  close.addEventListener("click", () => detail.classList.remove("open"));
  const buttons = element("div", "buttons");
  const over = element("button", "", onePrompt < 0 ? "This prompt over steps" : "All prompts");
  over.addEventListener("click", () => only(onePrompt < 0 ? columns.prompt[row] : -1));
  buttons.append(over);
  const parts = [close, buttons, element("h2", "", "Prompt"), whole(prompt)];
  for (const reference of references) parts.push(element("h2", "", "Reference"), whole(reference));
  parts.push(element("h2", "", "Completion"), lengths ? shaded(raw ?? completion, lengths, logprobs) : whole(raw ?? completion));
  if (lengths) parts.push(element("p", "muted", "The stronger its colour, the less likely a token was; point at it for its log-prob."));
  if (raw !== null && !raw.startsWith(completion)) parts.push(element("h2", "", "As rewards read it"), whole(completion));
  if (messages !== null) parts.push(element("h2", "", "All turns"), whole(messages));
  parts.push(element("h2", "", "Numbers"), numbers(row, status));
  if (details !== null) parts.push(element("h2", "", "Details of the rewards"), whole(details));
  detail.replaceChildren(...parts);
  detail.scrollTop = 0;
}

function only(prompt) {
  onePrompt = prompt;
  detail.classList.remove("open");
  apply();
}

function whole(text) {
  const made = element("p", text === "" ? "whole muted" : "whole");
  made.dir = "auto";
  made.append(...marked(visible(text) || "(empty)"));
  return made;
}

// A text with what was searched for marked.
function marked(text) {
  const wanted = form.elements.text.value.toLowerCase();
  const lower = text.toLowerCase();
  if (!wanted || lower.length !== text.length) return [text];
  const parts = [];
  let from = 0;
  for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, from)) {
    parts.push(text.slice(from, at), element("mark", "", text.slice(at, at + wanted.length)));
    from = at + wanted.length;
  }
  parts.push(text.slice(from));
  return parts;
}

// Tokens of length 0 are parts of one character: they count for the token that ends it.
function shaded(text, lengths, logprobs) {
  const made = element("p", "whole");
  made.dir = "auto";
  const characters = Array.from(text);
  let [at, sum] = [0, 0];
  Array.from(lengths).forEach((code, i) => {
    const length = code.codePointAt(0) - FIRST;
    sum += (logprobs.codePointAt(i) - FIRST) / 10;
    if (!length) return;
    const token = element("span", "", visible(characters.slice(at, at + length).join("")));
    token.style.backgroundColor = `rgba(var(--doubt), ${Math.min(0.75, sum / 8).toFixed(2)})`;
    token.title = sum >= 9.2 ? "log-prob -9.2 or less" : `log-prob ${sum ? "-" : ""}${sum.toFixed(1)}`;
    made.append(token);
    at += length;
    sum = 0;
  });
  return made;
}

function numbers(row, status) {
  const table = element("table");
  const line = (name, value) => {
    const made = element("tr");
    made.append(element("th", "", name), element("td", "", value));
    table.append(made);
  };
  if (about.runs.length === 2) line("run", visible(about.runs[columns.run[row]]));
  line("step, sample", `${columns.step[row]}, ${columns.sample[row]}`);
  line("reward", shortNumber(columns.total[row]));
  for (const name of about.rewards) {
    const [value, how] = [columns[`reward ${name}`][row], status[name]];
    if (how !== undefined) line(visible(name), Number.isNaN(value) ? visible(how) : shortNumber(value) + (how === "ok" ? "" : ` (${visible(how)})`));
  }
  line("advantage", shortNumber(columns.advantage[row], true));
  line("log-prob", shortNumber(columns.logprob[row]));
  const finish = about.finish[columns.finish[row]];
  line("tokens, finish", `${columns.length[row]}, ${visible(finish)}${finish === "length" ? " (cut)" : ""}`);
  return table;
}

// ---- start

function options(name, choices) {
  form.elements[name].replaceChildren(...choices.map(([value, text]) => {
    const made = element("option", "", text);
    made.value = value;
    return made;
  }));
}

// The keys of an address like rollouts.html#text=Rome&sign=- are the names of the filters.
function fromAddress() {
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (form.elements[name]) form.elements[name].value = value;
    else if (name === "prompt_of") onePrompt = columns.prompt[Number(value)];
  }
}

function typed(event) {
  clearTimeout(typed.timer);
  typed.timer = setTimeout(apply, event.target.name === "text" ? 250 : 60);
}

async function start() {
  about = await readJson("about");
  readColumns(await inflate("numbers"));
  const two = about.runs.length === 2;
  document.querySelector("[data-two]").hidden = !two;
  form.elements.view.parentElement.hidden = !two;
  const numbered = (names) => names.map((name, i) => [String(i), name === "length" ? "length (cut)" : visible(name)]);
  options("run", [["", "both"], ...numbered(about.runs)]);
  options("status", [["", "any"], ...numbered(about.status)]);
  options("finish", [["", "any"], ...numbered(about.finish)]);
  options("reward", [["total", "reward"], ...about.rewards.map((name) => [`reward ${name}`, visible(name)])]);
  fromAddress();
  form.addEventListener("input", typed);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => ((onePrompt = -1), setTimeout(apply)));
  document.getElementById("one").addEventListener("click", () => only(-1));
  document.getElementById("more").addEventListener("click", (event) =>
    event.target.setAttribute("aria-expanded", form.classList.toggle("open")));
  list.addEventListener("scroll", soon);
  list.addEventListener("keydown", move);
  addEventListener("resize", soon);
  await apply();
  const open = new URLSearchParams(location.hash.slice(1)).get("open");
  if (open !== null) await choose(Number(open));
}

function move(event) {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!by || typeof shown[0] !== "number") return;
  event.preventDefault();
  const next = Math.min(shown.length - 1, Math.max(0, shown.indexOf(chosen) + by));
  const [at, view] = [scrolled(), list.clientHeight];
  if (next * ROW < at) list.scrollTop -= ROW;
  else if ((next + 1) * ROW > at + view) list.scrollTop += ROW;
  choose(shown[next]);
}

start().catch((error) => (said.textContent = `The page could not be read: ${error.message}`));
