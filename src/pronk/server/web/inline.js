// Markdown inside a paragraph: emphasis, code, links. The text comes from a model, so it is hostile:
// nodes are built one by one, raw HTML stays text, and addresses are web or mail ones or nothing.

const SPECIAL = /[\\`*_~[!<\n]|https?:\/\//g;
const ESCAPED = /[!"#$%&'*+,\-./:;<=>?@[\]^_`{|}~\\]/;
const ANGLED = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const BARE = /https?:\/\/[^\s<>"'`]+/y;
const TARGET = /\(\s*(?:<([^<>\n]*)>|([^\s()]*(?:\([^\s()]*\)[^\s()]*)*))(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/y;
const LONGEST_LABEL = 1000;
const DEEPEST = 12;

/** The address where it is safe to follow, else null. */
export function safeUrl(text) {
  try {
    const url = new URL(text);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function link(href, label) {
  const anchor = document.createElement("a");
  anchor.href = href;
  anchor.target = "_blank";
  anchor.rel = "noopener noreferrer";
  anchor.append(label);
  return anchor;
}

/** A fragment that shows `text`. */
export function inline(text, depth = 0) {
  const out = document.createDocumentFragment();
  if (depth > DEEPEST) {
    out.append(text);
    return out;
  }
  const hopeless = new Set(); // delimiters without an end: nothing further on can have one either
  let plain = 0;
  let at = 0;
  const emit = (node, from, to) => {
    if (from > plain) out.append(text.slice(plain, from));
    if (node !== null) out.append(node);
    plain = at = to;
  };
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const found = SPECIAL.exec(text);
    if (!found) break;
    at = found.index;
    const read = READERS[found[0]] ?? readBare;
    const result = read(text, at, depth, hopeless);
    if (result) emit(result.node, at, result.end);
    else at += runLength(text, at);
  }
  if (plain < text.length) out.append(text.slice(plain));
  return out;
}

// Each reader gets the text and where its character stands, and returns {node, end} or null.
const READERS = {
  "\\": (text, at) => ESCAPED.test(text[at + 1] ?? "") && text[at + 1] !== "["
    && text[at + 1] !== "]" // \[ and \( open formulas more often than they escape anything
    ? { node: text[at + 1], end: at + 2 } : null,
  "\n": (text, at) => ({ node: document.createElement("br"), end: at + 1 }),
  "`": readCode,
  "*": readEmphasis,
  _: readEmphasis,
  "~": readEmphasis,
  "[": readLink,
  "!": (text, at, depth) => (text[at + 1] === "[" ? readLink(text, at + 1, depth) : null),
  "<": readAngled,
};

/** How many times the character at `at` stands there in a row. */
function runLength(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end++;
  return end - at;
}

function readCode(text, at, _depth, hopeless) {
  const n = runLength(text, at);
  if (hopeless.has(`\`${n}`)) return null;
  for (let end = text.indexOf("`", at + n); end >= 0; end = text.indexOf("`", end)) {
    const m = runLength(text, end);
    if (m === n) {
      const code = document.createElement("code");
      const inside = text.slice(at + n, end);
      code.textContent = /^ .*\S.* $/.test(inside) ? inside.slice(1, -1) : inside;
      return { node: code, end: end + n };
    }
    end += m;
  }
  hopeless.add(`\`${n}`);
  return null;
}

const TAGS = { "*": ["em", "strong"], _: ["em", "strong"], "~": [null, "del"] };

function readEmphasis(text, at, depth, hopeless) {
  const mark = text[at];
  const run = runLength(text, at);
  if (run > 3 || /\s/.test(text[at + run] ?? " ")) return null;
  if (mark === "_" && /[\p{L}\p{N}_]/u.test(text[at - 1] ?? " ")) return null;
  for (const n of run === 3 ? [3, 1, 2] : [run]) {
    const [one, two] = TAGS[mark];
    if ((n === 1 && !one) || (n === 3 && !one) || hopeless.has(mark + n)) continue;
    const end = closing(text, at + n, mark, n);
    if (end < 0) {
      hopeless.add(mark + n);
      continue;
    }
    const node = document.createElement(n === 1 ? one : two);
    const inside = inline(text.slice(at + n, end), depth + 1);
    if (n === 3) {
      const outer = document.createElement(one);
      node.append(inside);
      outer.append(node);
      return { node: outer, end: end + n };
    }
    node.append(inside);
    return { node, end: end + n };
  }
  return null;
}

/** Where the emphasis opened before `from` by `n` marks ends, -1 if it does not. */
function closing(text, from, mark, n) {
  for (let at = from; at < text.length; at++) {
    if (text[at] === "\\") at++;
    else if (text[at] === "`") {
      const m = runLength(text, at);
      const end = text.indexOf("`".repeat(m), at + m);
      at = end < 0 ? at + m - 1 : end + m - 1;
    } else if (text[at] === mark) {
      const m = runLength(text, at);
      const after = text[at + m] ?? " ";
      const closes = at > from && !/\s/.test(text[at - 1])
        && (mark !== "_" || !/[\p{L}\p{N}]/u.test(after));
      if (closes && (m === n || (m === 3 && n < 3))) return at + m - n;
      at += m - 1;
    }
  }
  return -1;
}

function readLink(text, at, depth) {
  let open = 0;
  let end = at;
  for (const last = Math.min(text.length, at + LONGEST_LABEL); end < last; end++) {
    if (text[end] === "\\") end++;
    else if (text[end] === "[") open++;
    else if (text[end] === "]" && --open === 0) break;
  }
  if (text[end] !== "]" || open !== 0) return null;
  TARGET.lastIndex = end + 1;
  const target = TARGET.exec(text);
  const href = target && safeUrl(target[1] ?? target[2]);
  if (!href) return null;
  const label = inline(text.slice(at + 1, end), depth + 1);
  for (const inner of label.querySelectorAll("a")) inner.replaceWith(...inner.childNodes);
  return { node: link(href, label.hasChildNodes() ? label : href), end: TARGET.lastIndex };
}

function readAngled(text, at) {
  ANGLED.lastIndex = at;
  const match = ANGLED.exec(text);
  const href = match && safeUrl(match[1]);
  return href ? { node: link(href, match[1]), end: ANGLED.lastIndex } : null;
}

function readBare(text, at) {
  BARE.lastIndex = at;
  let address = BARE.exec(text)?.[0] ?? "";
  address = address.replace(/[.,;:!?*_~\]]+$/, "");
  while (address.endsWith(")") && !balanced(address)) address = address.slice(0, -1);
  const href = safeUrl(address);
  return href ? { node: link(href, address), end: at + address.length } : null;
}

function balanced(text) {
  return text.split("(").length >= text.split(")").length;
}
