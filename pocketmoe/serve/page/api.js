// The server's API: requests with the key, errors in its own words, answers as they arrive.

const api = { key: remembered("key") ?? "" };

/** What this tab remembers; a browser may forbid even that. */
function remembered(name) {
  try {
    return sessionStorage.getItem(`pocketmoe.${name}`);
  } catch {
    return null;
  }
}

function remember(name, text) {
  try {
    sessionStorage.setItem(`pocketmoe.${name}`, text);
  } catch {
    // then it is asked for anew after a reload
  }
}

class ApiError extends Error {
  constructor(message, status, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

async function request(path, { body, signal } = {}) {
  const headers = { ...(api.key && { Authorization: `Bearer ${api.key}` }), ...(body && { "Content-Type": "application/json" }) };
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?", 0);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const text = await response.text();
  let words = text.slice(0, 300) || response.statusText;
  try {
    const { error } = JSON.parse(text);
    words = error.message ?? String(error);
  } catch {
    // not the API's error object: as it came
  }
  return new ApiError(words, response.status, response.headers.get("Retry-After"));
}

/** The events of a response as they arrive: {data} or {comment}. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    rest += done ? "\n\n" : value;
    const lines = rest.split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    yield* eventsOf(lines);
    if (done) return;
  }
}

function* eventsOf(lines) {
  // Every event of these APIs has its data in one line, so that nothing need be kept from one line to the next.
  for (const line of lines) {
    if (line.startsWith("data:")) yield { data: line.slice(5).trimStart() };
    else if (line.startsWith(":")) yield { comment: line.slice(1).trim() };
  }
}

/**
 * Asks for an answer; yields {text}, {reasoning}, {computed, of} while the prompt is computed, and at last {finish, usage}.
 * `turns`: [{role, text}]. A model without a chat template (`chat` false) continues the text of all turns.
 */
async function* answer({ model, turns, system, options, chat, signal }) {
  const asked = { model, stream: true, stream_options: { include_usage: true }, ...options };
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...turns.map(({ role, text }) => ({ role, content: text }))];
  const response = chat
    ? await request("/v1/chat/completions", { body: { ...asked, messages }, signal })
    : await request("/v1/completions", { body: { ...asked, prompt: turns.map(({ text }) => text).join("") }, signal });
  let finish = null;
  let usage = null;
  let figures = null;
  for await (const { data, comment } of events(response)) {
    if (comment !== undefined) {
      const progress = /(\d+)\s*(?:\/|of)\s*(\d+)/.exec(comment);
      if (progress) yield { computed: +progress[1], of: +progress[2] };
      continue;
    }
    if (data === "[DONE]") break;
    const piece = JSON.parse(data);
    if (piece.error) throw new ApiError(piece.error.message ?? String(piece.error), 500);
    usage = piece.usage ?? usage;
    figures = piece.pocketmoe ?? figures;
    const choice = piece.choices?.[0];
    const delta = chat ? choice?.delta : choice && { content: choice.text };
    if (delta?.reasoning_content) yield { reasoning: delta.reasoning_content };
    if (delta?.content) yield { text: delta.content };
    finish = choice?.finish_reason ?? finish;
  }
  if (!finish) throw new ApiError("The connection broke before the answer had ended.", 0);
  yield { finish, usage, figures };
}
