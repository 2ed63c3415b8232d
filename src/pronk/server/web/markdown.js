// Markdown as models write it: headings, lists, code fences, tables, quotes, rules, paragraphs.
// `Markdown` shows a text that grows and touches only its end, so nothing above it flickers.

import { copyButton, h } from "./dom.js";
import { highlight } from "./highlight.js";
import { inline } from "./inline.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const QUOTE = /^ {0,3}> ?/;
const TABLE_RULE = /^[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const DEEPEST = 12;

/** Blocks of the text: {type, first, end, ...}, `first` and `end` being lines. */
function parse(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const block = readBlock(lines, at, depth);
    blocks.push({ ...block, first: at });
    at = block.end;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return readFence(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    const text = line.slice(heading[0].length).trim().replace(/(?:^|[ \t])#+$/, "");
    return { type: "heading", level: heading[1].length, text, end: at + 1 };
  }
  if (RULE.test(line)) return { type: "rule", end: at + 1 };
  if (depth < DEEPEST) {
    if (QUOTE.test(line)) return readQuote(lines, at, depth);
    if (ITEM.test(line)) return readList(lines, at, depth);
  }
  if (isTable(lines, at)) return readTable(lines, at);
  return readParagraph(lines, at);
}

function readFence(lines, at, [, marks, language]) {
  const indent = indentOf(lines[at]);
  const closes = new RegExp(`^ {0,3}\\${marks[0]}{${marks.length},}[ \\t]*$`);
  let end = at + 1;
  while (end < lines.length && !closes.test(lines[end])) end++;
  const code = lines.slice(at + 1, end).map((line) => dedent(line, indent)).join("\n");
  return { type: "code", language, code, end: Math.min(end + 1, lines.length) };
}

function readQuote(lines, at, depth) {
  let end = at;
  while (end < lines.length && (QUOTE.test(lines[end])
    || (lines[end].trim() && !interrupts(lines, end)))) end++;
  const inside = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return { type: "quote", blocks: parse(inside, depth + 1), end };
}

/** Items that go on: by indentation, by a paragraph's next line, or by another item of the kind. */
function readList(lines, at, depth) {
  const [, margin, marker] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(marker);
  const sort = marker.at(-1);
  const items = [];
  let content = 0; // where the text of the item begins
  let loose = false;
  let blank = false;
  let end = at;
  for (let i = at; i < lines.length; i++) {
    const line = lines[i];
    const item = ITEM.exec(line);
    if (!line.trim()) {
      blank = true;
      items.at(-1).push("");
    } else if (items.length && indentOf(line) >= margin.length + 2) {
      items.at(-1).push(dedent(line, content));
      loose ||= blank && indentOf(line) < content + 2 && !item;
      blank = false;
      end = i + 1;
    } else if (item && !RULE.test(line) && item[2].at(-1) === sort) {
      if (items.length && blank) loose = true;
      content = item[0].length - Math.max(0, item[3].length - 4);
      items.push([line.slice(content)]);
      blank = false;
      end = i + 1;
    } else if (!blank && !interrupts(lines, i)) {
      items.at(-1).push(line.trimStart());
      end = i + 1;
    } else break;
  }
  const blocks = items.map((item) => parse(item, depth + 1));
  return { type: "list", start: ordered ? parseInt(marker, 10) : null, loose, items: blocks, end };
}

const cells = (line) => line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/)
  .map((cell) => cell.trim().replaceAll("\\|", "|"));

function isTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && TABLE_RULE.test(lines[at + 1])
    && cells(lines[at]).length === cells(lines[at + 1]).length;
}

function readTable(lines, at) {
  const align = cells(lines[at + 1]).map((rule) => (rule.endsWith(":")
    ? (rule.startsWith(":") ? "center" : "right") : null));
  let end = at + 2;
  while (end < lines.length && lines[end].trim() && !interrupts(lines, end)) end++;
  const rows = lines.slice(at + 2, end).map(cells);
  return { type: "table", head: cells(lines[at]), align, rows, end };
}

function readParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines, end)) end++;
  const text = lines.slice(at, end).map((line) => line.trim()).join("\n");
  return { type: "paragraph", text, end };
}

/** A line that ends the paragraph before it. A list does so only where it looks like one: a line
 *  may well begin with a year. */
function interrupts(lines, at) {
  const line = lines[at];
  const item = ITEM.exec(line);
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)
    || (item !== null && item[3] !== "" && /^(?:[-*+]|1[.)])$/.test(item[2])) || isTable(lines, at);
}

const indentOf = (line) => line.length - line.trimStart().length;
const dedent = (line, n) => line.slice(Math.min(n, indentOf(line)));

// --- showing ------------------------------------------------------------------------------------

const BUILDERS = {
  paragraph: (block) => h("p", {}, inline(block.text)),
  heading: (block) => h(`h${Math.min(block.level + 2, 6)}`, { className: `h${block.level}` },
    inline(block.text)),
  rule: () => h("hr"),
  quote: (block) => h("blockquote", {}, block.blocks.map(build)),
  list: buildList,
  table: buildTable,
  code: buildCode,
};

const build = (block) => BUILDERS[block.type](block);

function buildList(block) {
  // A tight list shows its paragraphs without their margins.
  const item = (blocks) => h("li", {}, blocks.map((inner) => (
    inner.type === "paragraph" && !block.loose ? inline(inner.text) : build(inner))));
  const list = h(block.start === null ? "ul" : "ol", {}, block.items.map(item));
  if (block.start !== null && block.start !== 1) list.start = block.start;
  return list;
}

function buildTable(block) {
  const cell = (tag, text, i) => h(tag, {
    className: block.align[i] ?? "", scope: tag === "th" ? "col" : null,
  }, inline(text ?? ""));
  const row = (texts) => h("tr", {}, block.head.map((_, i) => cell("td", texts[i], i)));
  const head = h("thead", {}, h("tr", {}, block.head.map((text, i) => cell("th", text, i))));
  const table = h("table", {}, head, h("tbody", {}, block.rows.map(row)));
  return h("div", { className: "table", tabIndex: 0, role: "group", "aria-label": "Table" }, table);
}

function buildCode(block) {
  const code = h("code", {}, highlight(block.code, block.language));
  const label = block.language || "text";
  return h("div", { className: "code" },
    h("div", { className: "code-head" }, h("span", {}, label),
      copyButton("Copy this code", () => code.textContent)),
    h("pre", { tabIndex: 0, role: "group", "aria-label": `Code, ${label}` }, code));
}

/** A text shown in `root`, which may grow by `update`. */
export class Markdown {
  constructor(root) {
    this.root = root;
    this.shown = []; // {from, source, type, language, element}
  }

  /** Shows `text`, which begins with the text of the last call. Only the last two blocks can still
   *  change by what is added: what looks like a block of its own may yet join the one before. */
  update(text) {
    const kept = Math.max(0, this.shown.length - 2);
    const from = this.shown[kept]?.from ?? 0;
    const lines = text.replace(/\r\n?/g, "\n").slice(from).split("\n");
    let offset = from;
    let line = 0;
    const fresh = parse(lines).map((block, i) => {
      for (; line < block.first; line++) offset += lines[line].length + 1;
      const source = lines.slice(block.first, block.end).join("\n");
      return { ...this.#show(block, source, this.shown[kept + i]), from: offset };
    });
    for (const old of this.shown.splice(kept)) {
      if (!fresh.some((block) => block.element === old.element)) old.element.remove();
    }
    this.shown.push(...fresh);
  }

  #show(block, source, old) {
    const { type, language } = block;
    let element = old?.element;
    if (old === undefined || old.source !== source || old.type !== type) {
      if (type === "code" && old?.type === type && old.language === language) {
        // The frame stays: somebody may be about to press its button.
        element.querySelector("code").replaceChildren(...highlight(block.code, language));
      } else {
        element = build(block);
        if (old === undefined) this.root.append(element);
        else old.element.replaceWith(element);
      }
    }
    return { source, type, language, element };
  }

  /** Texts of the blocks that will not change any more, from block `first` on. */
  settled(first, done) {
    return this.shown.slice(first, done ? undefined : -2).map((block) => block.element.innerText);
  }
}
