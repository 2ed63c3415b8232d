// Chats, kept in the browser's local storage, one key each. A chat is a tree of messages: editing
// or asking again adds a branch and loses nothing; `head` is the last message of the branch shown.

const PREFIX = "pronk.chat.";
const ID = /^[\w-]{1,64}$/;
const ROLES = ["user", "assistant", "tool"];

/** Random, also on pages without https, where crypto.randomUUID does not exist. */
export function newId(prefix) {
  const bytes = crypto.getRandomValues(new Uint8Array(9));
  return prefix + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A value of local storage, null where there is none or storage is off. */
export function recall(name) {
  try {
    return localStorage.getItem(`pronk.${name}`);
  } catch {
    return null;
  }
}

/** Keeps a value (null removes it); whether that worked. */
export function remember(name, value) {
  try {
    if (value === null) localStorage.removeItem(`pronk.${name}`);
    else localStorage.setItem(`pronk.${name}`, value);
    return true;
  } catch {
    return false;
  }
}

export function newChat(settings) {
  const now = Date.now();
  return { id: newId("c"), title: "New chat", named: false, created: now, updated: now,
    model: null, settings: { ...settings }, messages: {}, head: null };
}

/** All stored chats by id, and how many could not be read. Those stay where they are. */
export function loadChats() {
  const chats = new Map();
  let broken = 0;
  for (const key of storedKeys()) {
    try {
      const chat = checkChat(JSON.parse(localStorage.getItem(key)));
      chats.set(chat.id, chat);
    } catch {
      broken++;
    }
  }
  return { chats, broken };
}

function storedKeys() {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  } catch {
    return [];
  }
}

export const idOfKey = (key) => (key?.startsWith(PREFIX) ? key.slice(PREFIX.length) : null);
export const loadChat = (id) => checkChat(JSON.parse(localStorage.getItem(PREFIX + id)));
export const saveChat = (chat) => remember(`chat.${chat.id}`, JSON.stringify(chat));
export const dropChat = (id) => remember(`chat.${id}`, null);

/** Adds a message below `parent` (an id or null) and shows its branch. */
export function addMessage(chat, parent, fields) {
  const message = { id: newId("m"), parent, created: Date.now(), ...fields };
  chat.messages[message.id] = message;
  chat.head = message.id;
  chat.updated = message.created;
  return message;
}

/** The messages from the first one to `id`. */
export function pathTo(chat, id) {
  const path = [];
  for (let at = id; at !== null; at = chat.messages[at].parent) path.unshift(chat.messages[at]);
  return path;
}

/** The message and those that stand in its place on other branches, oldest first. */
export function siblings(chat, message) {
  return Object.values(chat.messages).filter((other) => other.parent === message.parent);
}

/** The end of the newest branch through a message. */
export function newestLeaf(chat, id) {
  const children = Object.values(chat.messages).filter((message) => message.parent === id);
  return children.length ? newestLeaf(chat, children.at(-1).id) : id;
}

// --- files --------------------------------------------------------------------------------------

export function exportText(chats) {
  return JSON.stringify({ format: "pronk-chats", version: 1, chats }, null, 1);
}

/** The chats of an exported file. Throws an Error that says what is wrong with it. */
export function importText(text, taken) {
  let file;
  try {
    file = JSON.parse(text);
  } catch (error) {
    throw new Error(`The file is not JSON: ${error.message}`);
  }
  if (file?.format !== "pronk-chats") throw new Error("The file does not hold chats of this page.");
  if (file.version !== 1) throw new Error(`The file has version ${file.version}; this page reads 1.`);
  if (!Array.isArray(file.chats)) throw new Error("The file's “chats” is not a list.");
  const chats = file.chats.map((chat, i) => {
    try {
      return checkChat(chat);
    } catch (error) {
      throw new Error(`Chat ${i + 1} of the file: ${error.message}`);
    }
  });
  // A chat that is here already comes in as a copy: neither is lost.
  return chats.map((chat) => (taken.has(chat.id) ? { ...chat, id: newId("c") } : chat));
}

function need(truth, what) {
  if (!truth) throw new Error(what);
}

const isNumber = (value) => typeof value === "number";
const isText = (value) => typeof value === "string";

/** The chat, if it has the shape that this page relies on. */
function checkChat(chat) {
  need(chat && ID.test(chat.id) && isText(chat.title), "it has no id or no title");
  need(chat.model === null || isText(chat.model), "its model is not a name");
  need(chat.settings && Object.values(chat.settings).every(isText), "its settings are not texts");
  need(chat.messages && typeof chat.messages === "object", "it has no messages");
  const seen = new Set();
  for (const [id, message] of Object.entries(chat.messages)) {
    const where = `message ${id}`;
    need(ID.test(id) && message?.id === id, `${where} has another id`);
    // Parents come first, so there is no circle.
    need(message.parent === null || seen.has(message.parent), `${where} has an unknown parent`);
    need(ROLES.includes(message.role), `${where} has the role ${message.role}`);
    need(isText(message.content), `${where} has no text`);
    need(message.role !== "tool" || isText(message.tool_call_id), `${where} answers no call`);
    need(Object.values(message.stats ?? {}).every((value) => value === null || isNumber(value)),
      `${where} has figures that are no numbers`);
    const calls = message.tool_calls ?? [];
    need(Array.isArray(calls) && calls.every((tool) => tool && isText(tool.id) && isText(tool.name)
      && isText(tool.arguments)), `${where} has a broken tool call`);
    seen.add(id);
  }
  need(chat.head === null || seen.has(chat.head), "its last message is missing");
  return chat;
}
