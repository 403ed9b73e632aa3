// A model's text as elements. Whatever a model writes can only become text, and these few elements: nothing here ever
// parses HTML, no address is loaded, and a link leads to http, https or mail alone.

const DEEPEST = 8; // lists and quotes inside each other; what is deeper stays text
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const ITEM = /^([ \t]{0,40})([-*+]|\d{1,9}[.)])(?:[ \t]+(.*)|)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const DIVIDER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

function element(tag, children = [], properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A text without those of `letters` that it ends with. */
function withoutEnd(text, letters) {
  let end = text.length;
  while (end && letters.includes(text[end - 1])) end -= 1;
  return text.slice(0, end);
}

/** The blocks of a text: kind, lines, and what else the kind needs. */
function blocksOf(lines) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const block = blockAt(lines, at);
    blocks.push(block);
    at = block.end;
  }
  return blocks;
}

function blockAt(lines, at) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return fenced(lines, at, fence);
  if (HEADING.test(line)) return { kind: "heading", lines: [line], end: at + 1 };
  if (RULE.test(line)) return { kind: "rule", lines: [line], end: at + 1 };
  if (QUOTE.test(line)) return run(lines, at, "quote", (next) => QUOTE.test(next));
  if (ITEM.test(line)) return list(lines, at);
  if (startsTable(lines, at)) return run(lines, at, "table", (next) => next.includes("|"));
  return run(lines, at, "paragraph", (next, index) => next.trim() && !startsOther(lines, index));
}

function run(lines, at, kind, belongs) {
  let end = at + 1;
  while (end < lines.length && belongs(lines[end], end)) end += 1;
  return { kind, lines: lines.slice(at, end), end };
}

function startsTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && DIVIDER.test(lines[at + 1]);
}

function startsOther(lines, at) {
  const line = lines[at];
  const item = ITEM.exec(line);
  const interrupts = item && item[3] && /^([-*+]|1[.)])$/.test(item[2]);
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || interrupts || startsTable(lines, at);
}

function fenced(lines, at, [, mark, language]) {
  const closing = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}\\s*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  const inside = lines.slice(at + 1, end);
  return { kind: "code", lines: inside, language: language.trim(), closed: end < lines.length, end: end + 1 };
}

/** A list goes on through indented lines, and through blank ones that an item or an indented line follows. */
function list(lines, at) {
  let end = at + 1;
  for (; end < lines.length; end += 1) {
    if (lines[end].trim()) {
      const goesOn = ITEM.test(lines[end]) || /^\s/.test(lines[end]) || (lines[end - 1].trim() && !startsOther(lines, end));
      if (!goesOn || RULE.test(lines[end])) break;
    } else if (!(end + 1 < lines.length && (ITEM.test(lines[end + 1]) || /^\s+\S/.test(lines[end + 1])))) break;
  }
  return { kind: "list", lines: lines.slice(at, end), end };
}

function rendered(block, depth) {
  const text = block.lines.join("\n");
  if (block.kind === "code") return codeBlock(text, block.language);
  if (block.kind === "rule") return element("hr");
  if (block.kind === "heading") {
    const [, marks, title] = HEADING.exec(text);
    return element(`h${Math.min(6, marks.length + 2)}`, inline(withoutEnd(title, "# \t")));
  }
  if (depth < DEEPEST && block.kind === "quote") {
    return element("blockquote", nested(block.lines.map((line) => QUOTE.exec(line)[1]), depth));
  }
  if (depth < DEEPEST && block.kind === "list") return listElement(block.lines, depth);
  if (block.kind === "table") return tableElement(block.lines);
  return element("p", inline(text));
}

function nested(lines, depth) {
  return blocksOf(lines).map((block) => rendered(block, depth + 1));
}

function listElement(written, depth) {
  const lines = written.map((line) => line.replace(/^\t+/, (tabs) => "    ".repeat(tabs.length)));
  const items = [];
  const margin = ITEM.exec(lines[0])[1].length;
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length < margin + 2) {
      items.push({ inside: [item[3] ?? ""], indent: item[1].length + item[2].length + 1 });
    } else {
      const { inside, indent } = items.at(-1);
      inside.push(line.slice(Math.min(indent, line.length - line.trimStart().length)));
    }
  }
  const first = ITEM.exec(lines[0])[2];
  const made = element(/\d/.test(first) ? "ol" : "ul", items.map(({ inside }) => itemElement(inside, depth)));
  if (/\d/.test(first)) made.start = parseInt(first, 10);
  return made;
}

function itemElement(lines, depth) {
  const blocks = blocksOf(lines);
  if (blocks.length && blocks[0].kind === "paragraph") {
    return element("li", [...inline(blocks[0].lines.join("\n")), ...blocks.slice(1).map((block) => rendered(block, depth + 1))]);
  }
  return element("li", blocks.map((block) => rendered(block, depth + 1)));
}

function cells(line) {
  const inside = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inside.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function tableElement(lines) {
  const [head, ...body] = [lines[0], ...lines.slice(2)].map(cells);
  const columns = Array.from({ length: Math.max(head.length, ...body.map((texts) => texts.length)) });
  const row = (tag, texts) => element("tr", columns.map((_, column) => element(tag, inline(texts[column] ?? ""))));
  const rows = body.map((texts) => row("td", texts));
  const made = element("table", [element("thead", [row("th", head)]), element("tbody", rows)]);
  return element("div", [made], { className: "scroll", tabIndex: 0, role: "region", ariaLabel: "Table" });
}

function codeBlock(text, language) {
  const copy = element("button", ["Copy"], { type: "button" });
  copy.addEventListener("click", () => copied(copy, text));
  const pre = element("pre", [element("code", [text])], { tabIndex: 0 });
  pre.setAttribute("aria-label", `Code ${language}`.trim());
  return element("div", [element("div", [element("span", [language || "text"]), copy]), pre], { className: "code" });
}

async function copied(button, text) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => (button.textContent = before), 1500);
}

const TOKEN = /\\[!-/:-@[-`{-~]|`+|<https?:\/\/[^\s<>]+>|https?:\/\/[^\s<>"'`]+|!?\[|\]|\*{1,3}|_{1,3}|~~/gy;
const PLAIN = /[^\\`<h![\]*_~]+/y;
const TARGET = /\]\([ \t]*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:[ \t]+"([^"\n]*)")?[ \t]*\)/y;
const MOST_OPEN = 64; // marks that wait for their second half

/** The nodes of a line or paragraph: code, emphasis, links; everything else is text. */
function inline(text) {
  const nodes = [];
  const open = []; // {mark, at: index in nodes}
  let at = 0;
  const say = (piece) => {
    if (nodes.at(-1) instanceof Text && !open.some((mark) => mark.at === nodes.length - 1)) nodes.at(-1).data += piece;
    else nodes.push(document.createTextNode(piece));
  };
  while (at < text.length) {
    const token = matchAt(TOKEN, text, at);
    const taken = token ? special(token, text, at, nodes, open, say) : 0;
    if (taken) {
      at += taken;
      continue;
    }
    const plain = token ?? matchAt(PLAIN, text, at) ?? text[at];
    say(plain);
    at += plain.length;
  }
  return nodes;
}

function matchAt(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text)?.[0];
}

/** Handles one token; how many characters it took, 0 where it is text. */
function special(token, text, at, nodes, open, say) {
  if (token[0] === "\\") {
    say(token[1]);
    return 2;
  }
  if (token[0] === "`") return codeSpan(token, text, at, nodes);
  if (token[0] === "<") return bareLink(token.slice(1, -1), nodes) && token.length;
  if (token[0] === "h") {
    const address = withoutEnd(token, ".,;:!?)]*_");
    return bareLink(address, nodes) && address.length;
  }
  if (token.endsWith("[")) {
    opened(token, nodes, open);
    return token.length;
  }
  if (token === "]") return link(text, at, nodes, open);
  return emphasis(token, text, at, nodes, open);
}

function codeSpan(ticks, text, at, nodes) {
  const closing = new RegExp(`(?<!\`)${ticks}(?!\`)`, "g");
  closing.lastIndex = at + ticks.length;
  const end = closing.exec(text)?.index;
  if (end === undefined) return 0;
  const inside = text.slice(at + ticks.length, end).replaceAll("\n", " ");
  nodes.push(element("code", [/^ .* $/.test(inside) && inside.trim() ? inside.slice(1, -1) : inside]));
  return end + ticks.length - at;
}

function opened(mark, nodes, open) {
  nodes.push(document.createTextNode(mark)); // its text, until the second half comes
  open.push({ mark, at: nodes.length - 1 });
  if (open.length > MOST_OPEN) open.shift();
}

/** Takes what follows an opened mark out of `nodes`. */
function closed(index, nodes, open) {
  const inside = nodes.splice(open[index].at).slice(1);
  open.length = index;
  return inside;
}

function emphasis(mark, text, at, nodes, open) {
  const before = at ? text[at - 1] : " ";
  const after = text[at + mark.length] ?? " ";
  const word = /[\p{L}\p{N}]/u;
  const closes = !/\s/.test(before) && !(mark[0] === "_" && word.test(after));
  const index = closes ? open.findLastIndex((other) => other.mark === mark) : -1;
  if (index >= 0 && open[index].at < nodes.length - 1) {
    const inside = closed(index, nodes, open);
    nodes.push(emphasized(mark, inside));
    return mark.length;
  }
  const inner = open.at(-1)?.mark;
  if (closes && inner && inner.length < mark.length && mark.startsWith(inner)) return emphasis(inner, text, at, nodes, open);
  if (/\s/.test(after) || (mark[0] === "_" && word.test(before))) return 0;
  opened(mark, nodes, open);
  return mark.length;
}

function emphasized(mark, inside) {
  if (mark === "~~") return element("del", inside);
  if (mark.length === 3) return element("strong", [element("em", inside)]);
  return element(mark.length === 2 ? "strong" : "em", inside);
}

function link(text, at, nodes, open) {
  const index = open.findLastIndex(({ mark }) => mark.endsWith("["));
  TARGET.lastIndex = at;
  const [target, written, title] = (index >= 0 && TARGET.exec(text)) || [];
  const address = written && safeAddress(written);
  if (!address) {
    if (index >= 0) open.splice(index, 1);
    return 0;
  }
  const image = open[index].mark === "![";
  const inside = closed(index, nodes, open);
  nodes.push(anchor(address, image ? ["image: ", ...inside] : inside.length ? inside : [address], title));
  return target.length;
}

function bareLink(address, nodes) {
  const safe = safeAddress(address);
  if (safe) nodes.push(anchor(safe, [address]));
  return Boolean(safe);
}

/** The address if a click on it may be allowed, else null. */
function safeAddress(address) {
  try {
    const { protocol, href } = new URL(address);
    return ["http:", "https:", "mailto:"].includes(protocol) ? href : null;
  } catch {
    return null;
  }
}

function anchor(href, children, title) {
  return element("a", children, { href, title: title ? `${href}\n${title}` : href, target: "_blank", rel: "noopener noreferrer nofollow" });
}

/** Shows a growing text in an element: blocks that are as they were stay, so that a selection and the work done stay. */
function showMarkdown(place, text) {
  const blocks = blocksOf(text.split(/\r\n|\n|\r/));
  const keys = blocks.map((block) => JSON.stringify([block.kind, block.language, block.lines]));
  const before = place.shownBlocks ?? [];
  const same = keys.findIndex((key, index) => key !== before[index]);
  const from = same < 0 ? keys.length : same;
  while (place.childNodes.length > from) place.lastChild.remove();
  place.append(...blocks.slice(from).map((block) => rendered(block, 0)));
  place.shownBlocks = keys;
}
