// The messages of a chat on the page. `Thread` keeps one element per message and changes only what
// changed; what buttons do is up to its `actions` (app.js).

import { announce, copyButton, grow, h, icon, iconButton } from "./dom.js";
import { highlight } from "./highlight.js";
import { Markdown } from "./markdown.js";
import { pathTo, siblings } from "./store.js";

const ENDS = {
  length: "The answer reached its limit of tokens.",
  stopped: "Stopped.",
  content_filter: "The server withheld the rest.",
};

const TITLES = {
  key: "The server wants a key",
  busy: "The server is busy",
  context: "The chat is too long for the model",
  network: "No connection",
  refused: "The server refused the request",
  server: "The server failed",
};

const HINTS = {
  context: "Start a new chat, edit an early message, or ask for fewer tokens.",
  refused: "The settings of this chat may hold what this server does not support.",
};

export class Thread {
  constructor(root, actions) {
    this.root = root;
    this.actions = actions;
    this.chat = null;
    this.elements = new Map(); // message id -> element
    this.streams = new Map(); // message id -> what grows while its answer comes in
    this.edits = new Map(); // message id -> text of an edit that was not sent
  }

  /** Shows the branch of `chat` that ends at its head. */
  show(chat) {
    if (this.chat !== chat) {
      this.chat = chat;
      this.elements.clear();
      this.streams.clear();
      this.root.replaceChildren();
    }
    const shown = pathTo(chat, chat.head).filter((message) => message.role !== "tool");
    const wanted = shown.map((message) => {
      if (!this.elements.has(message.id)) this.elements.set(message.id, this.#build(message));
      return this.elements.get(message.id);
    });
    for (const element of [...this.root.children]) if (!wanted.includes(element)) element.remove();
    wanted.forEach((element, i) => {
      if (this.root.children[i] !== element) this.root.insertBefore(element, this.root.children[i] ?? null);
    });
  }

  /** Builds a message anew: it began, ended or got an answer of a tool. */
  refresh(message) {
    const old = this.elements.get(message.id);
    if (!old) return;
    const element = this.#build(message);
    this.elements.set(message.id, element);
    old.replaceWith(element);
  }

  refreshAll() {
    for (const id of [...this.elements.keys()]) {
      if (this.chat.messages[id] && !this.streams.has(id)) this.refresh(this.chat.messages[id]);
    }
  }

  /** Shows more of an answer that is coming in, once per frame. */
  grow(message) {
    const stream = this.streams.get(message.id);
    if (!stream || stream.due) return;
    stream.due = requestAnimationFrame(() => {
      stream.due = 0;
      if (this.streams.get(message.id) === stream) this.#fill(message, stream);
    });
  }

  /** The answer is complete: the last of it, then its buttons. */
  finish(message) {
    const stream = this.streams.get(message.id);
    if (!stream) return;
    cancelAnimationFrame(stream.due);
    this.#fill(message, stream, true);
    this.streams.delete(message.id);
    const element = this.elements.get(message.id);
    element.removeAttribute("aria-busy");
    element.append(...this.#after(message));
    this.#cards(message, stream.cards);
    for (const call of message.tool_calls ?? []) announce(`Calls the tool ${call.name}`);
  }

  #fill(message, stream, done = false) {
    stream.element.classList.toggle("waiting", !done && !message.content && !message.tool_calls);
    stream.markdown.update(message.content);
    const texts = stream.markdown.settled(stream.said, done);
    texts.forEach((text) => announce(text));
    stream.said += texts.length;
    this.#cards(message, stream.cards);
  }

  #build(message) {
    return message.role === "user" ? this.#user(message) : this.#assistant(message);
  }

  #user(message) {
    return h("article", { className: "message user", "aria-label": "You" },
      h("div", { className: "bubble" }, message.content), this.#buttons(message));
  }

  #assistant(message) {
    const body = h("div", { className: "markdown" });
    const cards = h("div", { className: "cards" });
    const element = h("article", { className: "message assistant", "aria-label": "Answer" },
      h("p", { className: "who" }, message.model ?? ""), body, cards);
    const markdown = new Markdown(body);
    if (this.actions.isComing(message)) {
      element.setAttribute("aria-busy", "true");
      element.classList.add("waiting");
      const stream = { element, markdown, cards, due: 0, said: 0 };
      this.streams.set(message.id, stream);
      this.#fill(message, stream);
    } else {
      markdown.update(message.content);
      this.#cards(message, cards);
      element.append(...this.#after(message));
    }
    return element;
  }

  /** What stands below an answer: why it ended, figures, buttons. */
  #after(message) {
    const parts = [];
    if (message.error) parts.push(this.#error(message));
    else if (!message.finish) parts.push(note("Not finished: its page was closed, or is open elsewhere."));
    else if (ENDS[message.finish]) parts.push(note(ENDS[message.finish]));
    parts.push(this.#buttons(message));
    return parts;
  }

  #error(message) {
    const { kind, text, retryAt } = message.error;
    const retry = h("button", { type: "button", onclick: () => this.actions.again(message) });
    const count = () => {
      const left = Math.ceil(((retryAt ?? 0) - Date.now()) / 1000);
      retry.disabled = left > 0;
      retry.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
      if (left > 0) setTimeout(count, 250);
    };
    count();
    const hint = HINTS[kind] ? h("p", {}, HINTS[kind]) : null;
    const key = kind !== "key" ? null
      : h("button", { type: "button", onclick: () => this.actions.askKey() }, "Enter a key");
    return h("div", { className: "error", role: "alert" }, icon("alert"),
      h("div", {}, h("strong", {}, TITLES[kind] ?? TITLES.server), h("p", {}, text), hint,
        h("div", { className: "line" }, retry, key)));
  }

  #buttons(message) {
    const user = message.role === "user";
    const parts = [];
    if (message.content) parts.push(copyButton("Copy this message", () => message.content));
    if (message.content) {
      parts.push(iconButton("edit", "Edit this message", () => this.edit(message)));
    }
    if (!user) {
      parts.push(iconButton("again", "Answer again", () => this.actions.again(message)));
    }
    const figures = message.stats ? [h("span", { className: "stats" }, figuresOf(message.stats))] : [];
    return h("div", { className: "buttons" }, parts, this.#branches(message), figures);
  }

  /** "‹ 2 of 3 ›" where other branches leave the same place. */
  #branches(message) {
    const all = siblings(this.chat, message);
    const at = all.indexOf(message);
    if (all.length < 2) return [];
    const step = (name, label, to) => iconButton(name, label,
      () => this.actions.choose(all[to]), { disabled: !all[to] });
    return [h("span", { className: "branches", role: "group", "aria-label": "Versions" },
      step("left", "Version before", at - 1), h("span", {}, `${at + 1} / ${all.length}`),
      step("right", "Next version", at + 1))];
  }

  /** Opens a message's text for editing; sending makes a branch, the old one stays. */
  edit(message) {
    const element = this.elements.get(message.id);
    const user = message.role === "user";
    const area = h("textarea", {
      value: this.edits.get(message.id) ?? message.content, "aria-label": "Edit this message",
      oninput: () => {
        this.edits.set(message.id, area.value);
        grow(area);
      },
      onkeydown: (event) => {
        if (event.key === "Escape") close();
        else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && user) save();
        else return;
        event.preventDefault();
        event.stopPropagation();
      },
    });
    const close = () => {
      this.refresh(message);
      this.actions.edited();
    };
    const save = () => {
      if (!area.value.trim() || !this.actions.edit(message, area.value)) return;
      this.edits.delete(message.id);
      this.refresh(message);
    };
    element.replaceChildren(h("div", { className: "edit" }, area, h("div", { className: "line end" },
      h("button", { type: "button", onclick: close }, "Cancel"),
      h("button", { type: "button", className: "main", onclick: save }, user ? "Send" : "Save"))));
    grow(area);
    area.focus();
  }

  // --- tool calls -------------------------------------------------------------------------------

  /** Fills `box` with a card for each call. Cards are made once, so what is typed in stays. */
  #cards(message, box) {
    const calls = message.tool_calls ?? [];
    const coming = this.streams.has(message.id);
    const answers = pathTo(this.chat, this.chat.head)
      .filter((other) => other.role === "tool" && calls.some((call) => call.id === other.tool_call_id));
    if (coming) return calls.forEach((call, i) => growCard(box, call, i));
    const open = calls.filter((call) => !call.cut);
    const fields = [];
    box.replaceChildren(...calls.map((call) => {
      const answer = answers.find((other) => other.tool_call_id === call.id);
      return card(call, answer, () => this.#field(call, fields));
    }));
    if (answers.length) {
      const change = () => this.actions.reopen(message);
      box.append(h("div", { className: "buttons" },
        iconButton("edit", "Change the results", change), this.#branches(answers[0])));
    } else if (open.length) {
      const send = () => this.actions.results(message, open, fields.map((area) => area.value));
      const label = open.length > 1 ? "Send the results" : "Send the result";
      const earlier = Object.values(this.chat.messages).filter((other) => other.parent === message.id);
      const back = () => this.actions.choose(earlier.at(-1));
      box.append(h("div", { className: "line end" },
        earlier.length ? h("button", { type: "button", onclick: back }, "Back") : null,
        h("button", { type: "button", className: "main", onclick: send }, label)));
    }
    return undefined;
  }

  #field(call, fields) {
    const area = h("textarea", {
      rows: 2, value: call.draft ?? "", placeholder: "What the tool returned",
      oninput: () => {
        call.draft = area.value;
        this.actions.edited();
      },
    });
    fields.push(area);
    return h("label", {}, `Result of ${call.name}`, area);
  }
}

const note = (text) => h("p", { className: "note" }, text);

function card(call, answer, field) {
  const state = call.cut ? "cut off" : answer ? "answered" : "waits for its result";
  return h("section", { className: "card", "aria-label": `Call of the tool ${call.name}` },
    h("div", { className: "card-head" }, icon("tool"), h("strong", {}, call.name),
      h("span", {}, state)),
    h("pre", { tabIndex: 0, role: "group", "aria-label": "Arguments" },
      h("code", {}, highlight(pretty(call.arguments), "json"))),
    answer ? h("div", { className: "result" }, h("span", {}, "Result"), h("pre", {}, answer.content))
      : call.cut ? null : field());
}

/** A card whose call is still being written. */
function growCard(box, call, i) {
  if (!box.children[i]) {
    box.append(h("section", { className: "card", "aria-label": "Call of a tool" },
      h("div", { className: "card-head" }, icon("tool"), h("strong"), h("span", {}, "being written")),
      h("pre", {}, h("code"))));
  }
  box.children[i].querySelector("strong").textContent = call.name;
  box.children[i].querySelector("code").replaceChildren(...highlight(call.arguments, "json"));
}

function pretty(json) {
  if (/\d{16}/.test(json)) return json; // numbers that JSON.parse would round
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}

function figuresOf({ speed, first, prompt, cached, completion }) {
  const parts = [];
  if (speed) parts.push(`${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`);
  if (first !== undefined) parts.push(`first after ${first.toFixed(2)} s`);
  if (completion !== undefined) {
    parts.push(`${prompt}${cached ? ` (${cached} stored)` : ""} in, ${completion} out`);
  }
  return parts.join(" · ");
}
