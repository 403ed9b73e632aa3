// What the server's state says of this machine: memory by what for, hits, waiting, and every expert.

const machine = { last: null, since: null, heat: null, fetched: null, cursor: null, timer: 0, frame: 0, turn: 0 };
const STATE = "/pocketmoe/state";
const OFTEN_MS = 250; // while an answer comes
const SELDOM_MS = 4000;
const FADING_MS = 900; // until a used expert has lost most of its light
const KINDS = ["f", "c", "b", "d", "e", "g", "g", "g", "g"]; // colours of claims; the experts' own is the first, "a"

const still = matchMedia("(prefers-reduced-motion: reduce)");
const dark = matchMedia("(prefers-color-scheme: dark)");

/** Asks for the state now, and then again and again; a later call takes the place of an earlier one. */
async function watch() {
  clearTimeout(machine.timer);
  machine.turn += 1;
  const { turn } = machine;
  if (!document.hidden) {
    try {
      const state = await (await request(STATE)).json();
      if (turn === machine.turn) showMachine(state);
    } catch (error) {
      const words = error.status === 404 ? "This server does not tell what its memory holds." : `No figures: ${error.message}`;
      byId("machine-words").textContent = words;
      byId("machine-words").hidden = false;
      if (error.status === 404) return;
    }
  }
  if (turn === machine.turn) machine.timer = setTimeout(watch, page.running ? OFTEN_MS : SELDOM_MS);
}

/** From here on, figures are those of a new answer. */
function beginCounting() {
  machine.since = machine.last;
}

function showMachine(state) {
  const model = state.models.find(({ id }) => id === page.model) ?? null;
  const before = machine.last;
  const known = model && before?.model && before.model.id === model.id && before.model.uses.length === model.uses.length;
  machine.last = { state, model };
  if (!known) {
    machine.since = machine.last;
    machine.heat = model?.uses.map((layer) => layer.map(() => -Infinity));
    machine.fetched = model?.uses.map((layer) => layer.map(() => false));
  }
  byId("machine-words").hidden = Boolean(model?.loaded);
  byId("machine-words").textContent = "This model is not in memory: it is loaded when it is asked.";
  byId("machine-body").hidden = false;
  showMemory(state);
  showTiles(model);
  byId("experts-body").hidden = !model?.loaded;
  if (model?.loaded) light(model, known ? before.model : null);
}

function showMemory(state) {
  const claims = Object.entries(state.claims).filter(([, bytes]) => bytes > 0);
  claims.sort(([a, some], [b, others]) => (b === "expert slots") - (a === "expert slots") || others - some);
  const colours = claims.map(([name], index) => (name === "expert slots" ? "a" : KINDS[Math.min(index - (claims[0][0] === "expert slots"), KINDS.length - 1)]));
  byId("memory-bar").replaceChildren(...claims.map(([, bytes], index) => {
    const part = element("i", [], { className: colours[index] });
    part.style.width = `${(100 * bytes) / state.budget_bytes}%`;
    return part;
  }));
  const line = (colour, name, bytes) => element("li", [element("i", [], { className: `key ${colour}` }), element("span", [name]), element("span", [bytesOf(bytes)])]);
  const free = state.budget_bytes - claims.reduce((sum, [, bytes]) => sum + bytes, 0);
  byId("claims").replaceChildren(...claims.map(([name, bytes], index) => line(colours[index], name, bytes)), line("absent", "not promised", Math.max(0, free)));
  byId("memory-used").textContent = `${bytesOf(state.used_bytes)} of ${bytesOf(state.budget_bytes)}`;
  byId("memory-peak").textContent = `peak ${bytesOf(state.peak_bytes)}`;
  byId("memory-bar").ariaLabel = `Memory: ${byId("memory-used").textContent}, ${byId("memory-peak").textContent}`;
}

/** Figures since the answer began; before there was one, since the model was loaded. */
function showTiles(model) {
  const since = machine.since?.model && machine.since !== machine.last ? machine.since.model.counts : null;
  const counts = model?.counts ?? {};
  const grown = (name) => (counts[name] ?? 0) - (since?.[name] ?? 0);
  const hits = grown("hits") + grown("prefetch_hits");
  const wanted = hits + grown("misses");
  const tokens = grown("tokens");
  const seconds = grown("busy_s");
  const shown = {
    hits: wanted ? percent(hits / wanted) : "–",
    waiting: seconds > 0 ? percent(Math.min(1, grown("wait_s") / seconds)) : "–",
    speed: seconds > 0 && tokens ? rounded(tokens / seconds) : "–",
    read: wanted ? bytesOf(grown("bytes_read")) : "–",
  };
  for (const [name, text] of Object.entries(shown)) byId(`tile-${name}`).textContent = text;
  const asking = counted(machine.last.state.running, "request") + ` running, ${machine.last.state.waiting} waiting.`;
  byId("tiles-of").textContent = `${since ? "Since the last question" : "Since the model was loaded"}. ${asking}`;
  byId("summary").textContent = `${bytesOf(machine.last.state.used_bytes)} of ${bytesOf(machine.last.state.budget_bytes)} · ${shown.hits} from memory · ${shown.waiting} waiting`;
}

/** Lights the experts that were used since the last state, in another colour where they had to be fetched. */
function light(model, before) {
  const used = model.uses.map((layer, index) => layer.map((count, expert) => (before ? count - before.uses[index][expert] : 0)));
  const now = performance.now();
  let lit = 0;
  used.forEach((layer, index) => layer.forEach((count, expert) => {
    if (count > 0) {
      lit += 1;
      machine.heat[index][expert] = now;
      machine.fetched[index][expert] = before.resident[index][expert] !== "1";
    }
  }));
  const inMemory = model.resident.reduce((sum, layer) => sum + layer.split("1").length - 1, 0);
  const all = model.uses.reduce((sum, layer) => sum + layer.length, 0);
  const widest = Math.max(...model.uses.map((layer) => layer.length));
  byId("experts-words").textContent = `${counted(model.uses.length, "layer")}, top to bottom, of ${widest} experts each: ${inMemory.toLocaleString("en")} of ${all.toLocaleString("en")} in memory${lit ? `, ${lit} just used` : ""}.`;
  draw();
}

function draw() {
  cancelAnimationFrame(machine.frame);
  const model = machine.last?.model;
  const canvas = byId("experts");
  const room = byId("experts-frame").clientWidth;
  if (!model?.loaded || !room) return;
  const widest = Math.max(...model.uses.map((layer) => layer.length));
  const cell = cellOf(model, room);
  const [width, height] = [cell.width * widest, cell.height * model.uses.length];
  const scale = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  const fading = paint(context, model, cell);
  if (machine.cursor) outline(context, cell);
  if (fading) machine.frame = requestAnimationFrame(draw);
}

/** How large an expert is drawn, in CSS pixels. */
function cellOf(model, room) {
  const widest = Math.max(...model.uses.map((layer) => layer.length));
  const width = Math.max(2, Math.min(20, room / widest));
  return { width, height: Math.max(width, Math.min(14, 240 / model.uses.length)) };
}

/** Whether light is still fading. Without motion an expert is lit, or is not. */
function paint(context, model, cell) {
  const styles = getComputedStyle(document.documentElement);
  const [absent, resident, used, fetched] = ["absent", "resident", "used", "fetched"].map((name) => styles.getPropertyValue(`--${name}`));
  const gap = cell.width > 5 ? 1 : cell.width > 3 ? 0.5 : 0;
  const now = performance.now();
  let fading = false;
  model.uses.forEach((layer, row) => layer.forEach((_, column) => {
    const place = [column * cell.width, row * cell.height, cell.width - gap, cell.height - gap];
    context.fillStyle = model.resident[row][column] === "1" ? resident : absent;
    context.fillRect(...place);
    const age = now - machine.heat[row][column];
    if (age > 4 * FADING_MS) return;
    fading = fading || !still.matches;
    context.globalAlpha = still.matches ? Number(age < FADING_MS) : Math.exp(-age / FADING_MS);
    context.fillStyle = machine.fetched[row][column] ? fetched : used;
    context.fillRect(...place);
    context.globalAlpha = 1;
  }));
  return fading;
}

function outline(context, cell) {
  context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--ink");
  context.lineWidth = 1.5;
  const { layer, expert } = machine.cursor;
  context.strokeRect(expert * cell.width - 0.75, layer * cell.height - 0.75, cell.width + 0.5, cell.height + 0.5);
}

/** Puts the cursor on an expert and says what is known of it. */
function point(layer, expert) {
  const model = machine.last?.model;
  if (!model?.loaded) return;
  const row = Math.max(0, Math.min(model.uses.length - 1, layer));
  const column = Math.max(0, Math.min(model.uses[row].length - 1, expert));
  machine.cursor = { layer: row, expert: column };
  const where = model.resident[row][column] === "1" ? "in memory" : "on disk";
  byId("experts-at").textContent = `Layer ${row + 1}, expert ${column + 1}: ${where}, used for ${counted(model.uses[row][column], "token")}.`;
  draw();
}

function unpoint() {
  machine.cursor = null;
  byId("experts-at").textContent = "";
  draw();
}

function onExpertKey(event) {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!step) return;
  event.preventDefault();
  const { layer, expert } = machine.cursor ?? { layer: 0, expert: 0 };
  point(layer + step[0], expert + step[1]);
}

function onExpertPointer(event) {
  const model = machine.last?.model;
  if (!model?.loaded) return;
  const box = byId("experts").getBoundingClientRect();
  const widest = Math.max(...model.uses.map((layer) => layer.length));
  point(Math.floor(((event.clientY - box.top) / box.height) * model.uses.length), Math.floor(((event.clientX - box.left) / box.width) * widest));
}

function bytesOf(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let size = bytes;
  let unit = 0;
  for (; size >= 999.5 && unit < units.length - 1; unit += 1) size /= 1000;
  return `${unit && size < 100 ? rounded(size) : Math.round(size)} ${units[unit]}`;
}

function percent(share) {
  return `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%`;
}
