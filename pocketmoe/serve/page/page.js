// Everything together: models, settings, sending, stopping.

const page = { model: null, chat: true, models: [], running: null };

function byId(id) {
  return document.getElementById(id);
}

async function connect() {
  try {
    const { data } = await (await request("/v1/models")).json();
    unlock();
    page.models = data;
    byId("model").replaceChildren(...data.map(({ id }) => element("option", [id], { value: id })));
    byId("model").disabled = data.length < 2;
    const wanted = remembered("model");
    choose(data.some(({ id }) => id === wanted) ? wanted : data[0]?.id);
    watch();
  } catch (error) {
    if (error.status === 401 || error.status === 403) lock(error);
    else fail(error);
  }
}

function choose(id) {
  page.model = id;
  byId("model").value = id;
  remember("model", id);
  const { pocketmoe = {} } = page.models.find((model) => model.id === id) ?? {};
  page.chat = pocketmoe.chat ?? true;
  byId("message").placeholder = page.chat ? "Message" : "Text to continue";
  byId("welcome-title").textContent = page.chat ? `Ask ${id} something` : `Give ${id} a beginning`;
  byId("system").disabled = !page.chat;
  byId("system").placeholder = page.chat ? "none" : "this model has no chat template: it continues text";
  document.title = `${id} · PocketMoE`;
  ready();
}

/** The server wants a key: nothing else works before there is one. */
function lock(error) {
  byId("key").hidden = false;
  byId("chat").classList.add("locked");
  byId("key-words").textContent = api.key ? `The key was refused: ${error.message}` : "It stays in this tab, until you close it.";
  byId("machine-words").textContent = "Needs the server’s key.";
  byId("model").replaceChildren(element("option", ["needs a key"]));
  byId("key-text").select();
  say(byId("key-words").textContent);
  ready();
}

function unlock() {
  byId("key").hidden = true;
  byId("chat").classList.remove("locked");
}

function fail(error) {
  byId("welcome-title").textContent = "No answer from the server";
  byId("welcome-words").textContent = error.message;
  byId("model").replaceChildren(element("option", ["not connected"]));
  ready();
}

/** Which buttons may be used now. */
function ready() {
  const locked = !byId("key").hidden;
  byId("send").disabled = !page.model || locked || !byId("message").value.trim();
  byId("send").hidden = Boolean(page.running);
  byId("stop").hidden = !page.running;
  byId("new").disabled = !turns.length;
  byId("save").disabled = !turns.length;
  byId("model").disabled = Boolean(page.running) || page.models.length < 2;
  byId("welcome").hidden = turns.length > 0 || locked;
  byId("message").disabled = locked;
  for (const button of document.querySelectorAll(".acts button")) button.disabled = Boolean(page.running) && button.textContent !== "Copy";
}

/** Where the keyboard goes when a button has done its work; a finger wants no keyboard then. */
function rest() {
  byId(matchMedia("(pointer: coarse)").matches ? "turns" : "message").focus();
}

/** Tells a screen reader. */
function say(text) {
  byId("said").textContent = text;
}

/** Whether the settings may be sent; the first that may not is shown. */
function settingsHold() {
  const wrong = byId("options").querySelector(":invalid");
  if (!wrong) return true;
  view("settings");
  byId("options").reportValidity();
  wrong.focus();
  return false;
}

function options() {
  const chosen = {};
  for (const field of byId("options").querySelectorAll(".fields input")) {
    if (field.value !== "") chosen[field.name] = field.type === "number" ? field.valueAsNumber : field.value;
  }
  return chosen;
}

/** Sends what was said, or, with null, asks anew for the answer to what was said last. */
async function ask(text) {
  if (text !== null) addTurn("user", text, "done");
  const asked = turns.map(({ role, text: said }) => ({ role, text: said }));
  const turn = addTurn("assistant", "", "waiting");
  turn.progress = "Waiting for the first token";
  const running = new AbortController();
  page.running = running;
  beginCounting();
  ready();
  toEnd();
  rest();
  say("The answer has begun.");
  watch();
  const took = { began: performance.now(), first: 0, last: 0, pieces: 0 };
  try {
    const pieces = answer({ model: page.model, turns: asked, system: byId("system").value.trim(), options: options(), chat: page.chat, signal: running.signal });
    await take(turn, pieces, took);
    turn.state = "done";
  } catch (error) {
    turn.state = error.name === "AbortError" ? "stopped" : "failed";
    if (turn.state === "failed") turn.error = inWords(error);
    else turn.figures = took.pieces ? `stopped · ${figuresOf(took)}` : "stopped before the first token";
    if (error.status === 401) lock(error);
  }
  if (page.running === running) page.running = null;
  ended(turn);
}

async function take(turn, pieces, took) {
  let due = 0;
  for await (const piece of pieces) {
    if (piece.finish) {
      turn.figures = figuresOf({ ...took, ...piece });
      if (piece.finish === "length") turn.figures += " · ended by the limit of tokens";
      break;
    }
    if (piece.of) turn.progress = `Reading the prompt: ${piece.computed} of ${counted(piece.of, "token")}`;
    else {
      took.last = performance.now();
      took.first ||= took.last;
      took.pieces += 1;
      turn.state = "streaming";
      turn.text += piece.text ?? "";
      turn.reasoning += piece.reasoning ?? "";
    }
    due ||= requestAnimationFrame(() => {
      due = 0;
      showTurn(turn);
    });
  }
  cancelAnimationFrame(due);
}

function ended(turn) {
  showTurn(turn);
  ready();
  watch();
  const words = { done: "Answer: ", stopped: "Stopped. ", failed: "" }[turn.state];
  if (turn.state !== "failed") say(words + turn.text.slice(0, 1500));
}

function inWords(error) {
  if (error.status === 429) return `${error.message} Try again${error.retryAfter ? ` in ${error.retryAfter} s` : " in a moment"}.`;
  return error instanceof ApiError ? error.message : `The answer broke off: ${error.message}`;
}

function view(name) {
  document.body.dataset.view = name;
  for (const button of document.querySelectorAll("nav button")) button.setAttribute("aria-pressed", button.dataset.view === name);
  if (name === "machine") draw();
}

function send(event) {
  event.preventDefault();
  const text = byId("message").value;
  if (byId("send").disabled || page.running || !text.trim() || !settingsHold()) return;
  byId("message").value = "";
  ask(page.chat ? text.trim() : text);
}

function newConversation() {
  page.running?.abort();
  if (turns.length) dropFrom(turns[0]);
  ready();
  rest();
  say("A new conversation.");
}

function save() {
  const address = URL.createObjectURL(new Blob([savedConversation()], { type: "application/json" }));
  element("a", [], { href: address, download: "conversation.json" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

function stop() {
  page.running?.abort();
  rest();
}

byId("composer").addEventListener("submit", send);
byId("message").addEventListener("input", ready);
byId("message").addEventListener("keydown", (event) => {
  if (!sends(event)) return;
  event.preventDefault();
  byId("composer").requestSubmit();
});
byId("stop").addEventListener("click", stop);
byId("new").addEventListener("click", newConversation);
byId("save").addEventListener("click", save);
byId("model").addEventListener("change", (event) => {
  choose(event.target.value);
  watch();
});
byId("options").addEventListener("submit", (event) => event.preventDefault());
byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  api.key = byId("key-text").value.trim();
  remember("key", api.key);
  connect();
});
for (const button of document.querySelectorAll("nav button")) button.addEventListener("click", () => view(button.dataset.view));
document.addEventListener("keydown", (event) => event.key === "Escape" && page.running && stop());
document.addEventListener("visibilitychange", () => page.model && watch());
byId("experts").addEventListener("keydown", onExpertKey);
byId("experts").addEventListener("pointermove", onExpertPointer);
byId("experts").addEventListener("pointerleave", unpoint);
byId("experts").addEventListener("blur", unpoint);
byId("experts").addEventListener("focus", () => point(0, 0));
new ResizeObserver(draw).observe(byId("experts-frame"));
dark.addEventListener("change", draw);
still.addEventListener("change", draw);
connect();
rest();
