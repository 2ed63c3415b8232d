// Light colours for code: comments, strings, numbers, keywords, names that are called or defined.
// One regular expression per language; no pattern can match in two ways, so time stays linear, and
// what is not closed yet counts up to the end, as code arrives piece by piece.

const END = String.raw`(?![\s\S])`; // of the code: "$" would be that of a line
const C_COMMENT = String.raw`\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|${END})`;
const HASH = String.raw`#[^\n]*`;
const DOUBLE = String.raw`"(?:\\[\s\S]|[^"\\\n])*"?`;
const SINGLE = String.raw`'(?:\\[\s\S]|[^'\\\n])*'?`;
const TICKS = "`(?:\\\\[\\s\\S]|[^`\\\\])*`?";
const TRIPLE = String.raw`"""[\s\S]*?(?:"""|${END})|'''[\s\S]*?(?:'''|${END})`;
const NUMBER = String.raw`\b(?:0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\w*`;
const CALLED = String.raw`\b[A-Za-z_]\w*(?=\()`;

const words = (list) => String.raw`\b(?:${list.trim().replace(/\s+/g, "|")})\b`;
const C_WORDS = `auto bool break case catch char class const constexpr continue default delete do
  double else enum extern false final float for goto if import include inline int interface long
  namespace new null nullptr operator override package private protected public return short signed
  sizeof static string struct super switch template this throw throws true try typedef typename
  union unsigned using var virtual void volatile while`;

const LANGUAGES = {
  python: [HASH, `[rbfuRBFU]{0,2}(?:${TRIPLE}|${DOUBLE}|${SINGLE})`, words(`False None True and as
    assert async await break case class continue def del elif else except finally for from global if
    import in is lambda match nonlocal not or pass raise return self try while with yield`)],
  js: [C_COMMENT, `${DOUBLE}|${SINGLE}|${TICKS}`, words(`as async await boolean break case catch
    class const continue default delete do else enum export extends false finally for from function
    if implements import in instanceof interface let new null number of private public readonly
    return static string super switch this throw true try type typeof undefined var void while
    yield`)],
  c: [`${C_COMMENT}|^#[a-z]+`, `${DOUBLE}|${SINGLE}`, words(C_WORDS)],
  rust: [C_COMMENT, DOUBLE, words(`as async await bool break char const continue crate dyn else enum
    false fn for if impl in let loop match mod move mut pub ref return self Self static str struct
    super trait true type unsafe use usize where while i32 i64 u8 u32 u64 f32 f64`)],
  go: [C_COMMENT, `${DOUBLE}|${SINGLE}|${TICKS}`, words(`bool break byte case chan const continue
    default defer else error fallthrough false float64 for func go goto if import int int64
    interface map nil package range return rune select string struct switch true type var`)],
  shell: [String.raw`(?<=^|\s)#[^\n]*`, `${DOUBLE}|'[^']*'?`, words(`case cd do done echo elif else
    esac exit export fi for function if in local read return set source sudo then until while`) +
    String.raw`|\$\w+|\$\{[^}\n]*\}`],
  json: [C_COMMENT, DOUBLE, words("true false null"), `${DOUBLE}(?=\\s*:)`],
  sql: [String.raw`--[^\n]*|\/\*[\s\S]*?(?:\*\/|${END})`, SINGLE, words(`ALTER AND AS ASC BETWEEN BY CASE
    CREATE CROSS DELETE DESC DISTINCT DROP ELSE END EXISTS FROM FULL GROUP HAVING IN INDEX INNER
    INSERT INTO IS JOIN KEY LEFT LIKE LIMIT NOT NULL OFFSET ON OR ORDER OUTER PRIMARY RIGHT SELECT
    SET TABLE THEN UNION UPDATE VALUES VIEW WHEN WHERE WITH`), CALLED, "i"],
  html: [String.raw`<!--[\s\S]*?(?:-->|${END})`, String.raw`(?<==\s*)(?:"[^"]*"?|'[^']*'?)`,
    String.raw`<\/?[\w:!-]+|\/?>`, String.raw`\b[\w:-]+(?==)`],
  css: [C_COMMENT, `${DOUBLE}|${SINGLE}`, String.raw`[@.#][\w-]+`, String.raw`[\w-]+(?=\s*:)`],
  yaml: [HASH, `${DOUBLE}|${SINGLE}`, words("true false null yes no"), String.raw`[\w.-]+(?=:)`],
  diff: [String.raw`^@@[^\n]*`, String.raw`^\+[^\n]*`, String.raw`^-[^\n]*`],
};

const ALIASES = {
  py: "python", python3: "python", javascript: "js", jsx: "js", ts: "js", tsx: "js",
  typescript: "js", mjs: "js", cpp: "c", "c++": "c", h: "c", cs: "c", csharp: "c", java: "c",
  kotlin: "c", swift: "c", php: "c", rs: "rust", golang: "go", sh: "shell", bash: "shell",
  zsh: "shell", console: "shell", jsonc: "json", xml: "html", svg: "html", scss: "css", yml: "yaml",
  toml: "yaml", ini: "yaml", patch: "diff", postgresql: "sql", mysql: "sql", sqlite: "sql",
};

const compiled = new Map();

function pattern(language) {
  const name = ALIASES[language] ?? language;
  if (!Object.hasOwn(LANGUAGES, name)) return null;
  if (!compiled.has(name)) {
    const [comment, string, keyword, named = CALLED, flags = ""] = LANGUAGES[name];
    const groups = { comment, named, string, keyword, number: NUMBER };
    // A key of JSON is a string too, and a keyword before a bracket looks like a call.
    const order = named === CALLED
      ? ["comment", "string", "keyword", "named", "number"]
      : ["comment", "named", "string", "keyword", "number"];
    const source = order.map((group) => `(?<${group}>${groups[group]})`).join("|");
    compiled.set(name, new RegExp(source, `gm${flags}`));
  }
  return compiled.get(name);
}

/** Nodes that show `code`; plain text where the language is unknown. */
export function highlight(code, language) {
  const expression = pattern(language.toLowerCase());
  if (!expression || code.length > 50_000) return [document.createTextNode(code)];
  const nodes = [];
  let end = 0;
  for (const match of code.matchAll(expression)) {
    if (!match[0]) continue;
    nodes.push(document.createTextNode(code.slice(end, match.index)));
    const span = document.createElement("span");
    span.className = `t-${Object.keys(match.groups).find((key) => match.groups[key] !== undefined)}`;
    span.textContent = match[0];
    nodes.push(span);
    end = match.index + match[0].length;
  }
  nodes.push(document.createTextNode(code.slice(end)));
  return nodes;
}
