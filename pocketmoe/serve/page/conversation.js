// The conversation: its turns, and how they are shown. A turn is {role, text, reasoning, state, figures, error, view};
// state is "done", "waiting" for its first token, "streaming", "stopped" or "failed".

const turns = [];

function addTurn(role, text, state) {
  const turn = { role, text, reasoning: "", state, figures: "", error: "", progress: "", view: null };
  turn.view = turnView(turn);
  turns.push(turn);
  byId("turns").append(turn.view.root);
  showTurn(turn);
  return turn;
}

/** Takes back the turns from one on. */
function dropFrom(turn) {
  for (const dropped of turns.splice(turns.indexOf(turn))) dropped.view.root.remove();
}

/** The elements of a turn; they are made once and filled as it grows. */
function turnView(turn) {
  const view = { text: element("div", [], { className: "text", dir: "auto" }) };
  view.title = element("h3", [titleOf(turn)]);
  view.thought = element("div", [], { className: "text", dir: "auto" });
  view.thoughtTitle = element("summary", ["Reasoning"]);
  view.reasoning = element("details", [view.thoughtTitle, view.thought], { className: "reasoning", hidden: true });
  view.progress = element("p", [], { className: "progress", hidden: true });
  view.error = element("p", [], { className: "error", hidden: true });
  view.error.setAttribute("role", "alert");
  view.figures = element("p", [], { className: "figures" });
  view.acts = element("div", acts(turn), { className: "acts" });
  const under = element("div", [view.acts, view.figures], { className: "under" });
  const inside = [view.title, view.reasoning, view.progress, view.text, view.error, under];
  view.root = element("article", inside, { className: turn.role, tabIndex: -1 });
  return view;
}

function titleOf({ role }) {
  if (role === "user") return page.chat ? "You" : "Text";
  return page.chat ? "Answer" : "Continuation";
}

function acts(turn) {
  const named = (name, label, act) => {
    const button = element("button", [name], { type: "button", ariaLabel: `${name} ${label}` });
    button.addEventListener("click", () => act(turn, button));
    return button;
  };
  const copy = (label) => named("Copy", label, (_, button) => copied(button, turn.text));
  if (turn.role === "user") return [named("Edit", "what you said", editTurn), copy("what you said")];
  return [named("Retry", "this answer", retryTurn), copy("this answer")];
}

function showTurn(turn) {
  const { view } = turn;
  const atEnd = isAtEnd();
  const running = turn.state === "waiting" || turn.state === "streaming";
  view.root.classList.toggle("busy", running);
  view.root.setAttribute("aria-busy", running);
  const plain = turn.role === "user" || !page.chat;
  view.text.classList.toggle("plain", plain);
  if (plain) view.text.textContent = turn.text;
  else showMarkdown(view.text, turn.text);
  view.text.hidden = !turn.text;
  view.reasoning.hidden = !turn.reasoning;
  if (turn.reasoning) showMarkdown(view.thought, turn.reasoning);
  view.thoughtTitle.textContent = running && !turn.text ? "Reasoning…" : "Reasoning";
  view.progress.textContent = turn.progress;
  view.progress.hidden = turn.state !== "waiting";
  view.error.textContent = turn.error;
  view.error.hidden = !turn.error;
  view.figures.textContent = turn.figures;
  view.acts.hidden = running;
  view.acts.lastChild.hidden = !turn.text; // Copy
  if (atEnd) toEnd();
}

/** Whether the newest text is in sight; who has scrolled up to read is left there. */
function isAtEnd() {
  const place = byId("turns");
  return place.scrollHeight - place.scrollTop - place.clientHeight < 40;
}

function toEnd() {
  const place = byId("turns");
  place.scrollTop = place.scrollHeight;
}

/** Lets a turn's text be changed in its place; what followed it is asked anew. */
function editTurn(turn) {
  const { view } = turn;
  if (view.root.querySelector("form")) return;
  const field = element("textarea", [], { value: turn.text, rows: Math.min(12, turn.text.split("\n").length + 1) });
  field.setAttribute("aria-label", "What you said");
  const send = element("button", ["Send again"], { className: "main" });
  const cancel = element("button", ["Cancel"], { type: "button" });
  const form = element("form", [field, element("div", [send, cancel], { className: "row" })], { className: "edit" });
  const end = () => {
    form.remove();
    view.text.hidden = false;
    view.acts.hidden = false;
    view.acts.firstChild.focus();
  };
  cancel.addEventListener("click", end);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") end();
    if (sends(event)) form.requestSubmit();
    if (event.key === "Escape" || sends(event)) event.preventDefault();
    event.stopPropagation();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!field.value.trim() || page.running || !settingsHold()) return;
    const text = field.value;
    dropFrom(turn);
    ask(text);
  });
  view.text.hidden = true;
  view.acts.hidden = true;
  view.text.before(form);
  field.focus();
}

/** Asks anew for an answer; those after it are taken back. */
function retryTurn(turn) {
  if (page.running || !settingsHold()) return;
  dropFrom(turn);
  ask(null);
}

/** Whether a key means: send. Not while a word is being composed, as in Japanese. */
function sends(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

/** What an answer took, in words. */
function figuresOf({ usage, figures, began, first, last, pieces }) {
  const tokens = usage?.completion_tokens ?? pieces;
  const speed = figures?.decode_tokens_per_s ?? (tokens > 1 && last > first ? ((tokens - 1) * 1000) / (last - first) : null);
  const reused = usage?.prompt_tokens_details?.cached_tokens;
  const firstS = figures?.ttft_s ?? (first - began) / 1000;
  return [
    `${counted(tokens, "token")}`,
    speed && `${rounded(speed)} tokens/s`,
    `first after ${rounded(firstS)} s`,
    reused !== undefined && `${reused} of ${counted(usage.prompt_tokens, "prompt token")} reused`,
  ].filter(Boolean).join(" · ");
}

function counted(count, word) {
  return `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
}

/** Three digits, or whole. */
function rounded(number) {
  if (number >= 100) return Math.round(number).toLocaleString("en");
  return number.toFixed(number >= 10 ? 1 : 2);
}

function savedConversation() {
  const system = byId("system").value.trim();
  const said = turns.filter(({ text }) => text).map(({ role, text, reasoning }) => ({ role, content: text, ...(reasoning && { reasoning_content: reasoning }) }));
  return JSON.stringify({ pocketmoe_chat: 1, messages: [...(system ? [{ role: "system", content: system }] : []), ...said] }, null, 1);
}
