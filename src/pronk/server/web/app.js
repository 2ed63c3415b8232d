// The page: which chat is open, what its buttons do, and answers coming in.

import { receive } from "./answers.js";
import { isUp, listModels } from "./api.js";
import { SettingsDialog, askChat, askKey } from "./dialogs.js";
import { $, announce, download, grow, h, iconButton, toast } from "./dom.js";
import { Follower, narrow, showSidebar, switchTheme, toggleSidebar, uncover } from "./frame.js";
import { Thread } from "./messages.js";
import { EMPTY, buildBody, readSettings } from "./request.js";
import { addMessage, dropChat, exportText, idOfKey, importText, loadChat, loadChats, newChat,
  newestLeaf, pathTo, recall, remember, saveChat } from "./store.js";

const EXAMPLES = [
  ["Explain a thing", "Explain in simple words how a bicycle stays upright."],
  ["Write some code", "Write a Python function that finds the longest common prefix of a list of words, with a short test."],
  ["Compare", "Compare tea and coffee in a table: taste, caffeine, cost, ritual."],
  ["Make a plan", "Plan a quiet weekend with one walk, one good meal and no screens."],
];

const input = $("#input");
const follower = new Follower($("#scroller"), $("#thread"), $("#down"));

const { chats, broken } = loadChats();
const runs = new Map(); // chat id -> {controller, message} of the answer that is coming in
let chat = null; // the one that is shown
let key = recall("key");
let troubled = false;
const unsaved = new Set(); // ids of chats that saveSoon will save

// --- chats --------------------------------------------------------------------------------------

function defaults() {
  try {
    return { ...EMPTY, ...JSON.parse(recall("settings")) };
  } catch {
    return { ...EMPTY };
  }
}

const draftName = () => `draft.${chats.has(chat.id) ? chat.id : "new"}`;

function openChat(next) {
  chat = next;
  history.replaceState(null, "", chats.has(chat.id) ? `#${chat.id}` : location.pathname);
  input.value = recall(draftName()) ?? "";
  grow(input);
  chooseModel(chat.model);
  showChat();
  follower.toEnd();
}

function startChat() {
  openChat(newChat(defaults()));
  uncover();
  if (!narrow.matches) input.focus();
}

/** Everything that depends on the chat that is shown. */
function showChat() {
  thread.show(chat);
  $("#empty").hidden = chat.head !== null;
  $("#title").textContent = chat.title;
  document.title = chats.has(chat.id) ? `${chat.title} · Pronk` : "Pronk";
  const running = runs.has(chat.id);
  const send = $("#send");
  send.classList.toggle("running", running);
  send.title = running ? "Stop (Esc)" : "Send";
  send.setAttribute("aria-label", running ? "Stop" : "Send");
  $("#working").textContent = running ? "Answering…" : "";
  $("#settings-open").classList.toggle("marked",
    Object.keys(EMPTY).some((name) => (chat.settings[name] ?? EMPTY[name]) !== EMPTY[name]));
  listChats();
}

function listChats() {
  const sorted = [...chats.values()].sort((a, b) => b.updated - a.updated);
  const focused = document.activeElement?.closest("#chats [data-id]")?.dataset.id;
  $("#chats").replaceChildren(...sorted.map((item) => h("li", {},
    h("button", {
      type: "button", className: "open", "data-id": item.id, title: item.title,
      "aria-current": item === chat ? "page" : null,
      onclick: () => {
        openChat(item);
        uncover();
      },
    }, item.title, runs.has(item.id) ? h("span", { className: "dot", title: "Answering" }) : null),
    iconButton("more", `Options of “${item.title}”`, () => chatOptions(item)))));
  if (focused) $(`#chats [data-id="${focused}"]`)?.focus();
}

async function chatOptions(item) {
  const { action, name } = await askChat(item);
  if (action === "save" && name) {
    Object.assign(item, { title: name, named: true });
    save(item);
  } else if (action === "export") {
    exportChats([item], item.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40));
  } else if (action === "delete") deleteChat(item);
  showChat();
}

function deleteChat(item) {
  runs.get(item.id)?.controller.abort();
  chats.delete(item.id);
  dropChat(item.id);
  if (item === chat) startChat();
  toast("Chat deleted", { label: "Undo", run: () => {
    chats.set(item.id, item);
    save(item);
    openChat(item);
  } });
}

function save(item) {
  chats.set(item.id, item);
  if (!saveChat(item)) toast("The browser's storage is full or off: this chat is not kept. Export it.");
}

/** Saves a chat soon: once a second while an answer comes in. */
function saveSoon(item) {
  if (!chats.has(item.id) || unsaved.has(item.id)) return;
  unsaved.add(item.id);
  setTimeout(() => {
    unsaved.delete(item.id);
    if (chats.get(item.id) === item) save(item);
  }, 1000);
}

function exportChats(list, name) {
  download(`pronk-${name}.json`, exportText(list));
}

async function importFile(file) {
  try {
    const list = importText(await file.text(), chats);
    list.forEach(save);
    if (list.length) openChat(list[0]);
    toast(`${list.length} ${list.length === 1 ? "chat" : "chats"} imported`);
  } catch (error) {
    notice(error.message);
  }
}

// --- answers ------------------------------------------------------------------------------------

/** Asks for the message after `parent`. False, with the reason shown, when it cannot be asked. */
function answer(item, parent) {
  const model = $("#model").value;
  if (Object.keys(readSettings(item.settings).errors).length) {
    settings.open(item.settings);
    return false;
  }
  const body = buildBody(pathTo(item, parent), item.settings, model);
  const message = addMessage(item, parent, { role: "assistant", content: "", model, finish: null });
  item.model = model;
  runs.set(item.id, { controller: new AbortController(), message });
  save(item);
  announce("Answering", true);
  follower.toEnd();
  showChat();
  receiveInto(item, message, body);
  return true;
}

async function receiveInto(item, message, body) {
  const { signal } = runs.get(item.id).controller;
  await receive(message, body, key, signal, () => {
    thread.grow(message);
    saveSoon(item);
  });
  runs.delete(item.id);
  if (chats.has(item.id)) save(item);
  thread.finish(message);
  showChat();
  if (message.error?.kind === "key") enterKey(message.error.text, () => again(item, message));
}

/** Answers in the place of `message`: beside it, or instead of it where it says nothing. */
function again(item, message) {
  if (busy(item)) return;
  const blank = message.error && !message.content && !message.tool_calls;
  if (answer(item, message.parent) && blank) {
    delete item.messages[message.id];
    showChat();
  }
}

function busy(item) {
  if (runs.has(item.id)) toast("An answer is coming in: stop it first");
  else if (!$("#model").value) notice("No model is there yet: nothing was sent.");
  else return false;
  return true;
}

function stop() {
  runs.get(chat.id)?.controller.abort();
}

/** Sends what is typed. It leaves the box only once it stands in the chat. */
function send() {
  const text = input.value;
  if (!text.trim() || busy(chat)) return;
  const last = chat.messages[chat.head];
  if (last?.tool_calls?.some((call) => !call.cut)) {
    toast("The tool's result comes first: type it into the card, or answer again");
    $(".card textarea:last-of-type")?.focus();
    return;
  }
  if (submit(chat, chat.head, text)) {
    input.value = "";
    grow(input);
  }
}

function submit(item, parent, text) {
  if (busy(item)) return false;
  const before = { head: item.head, title: item.title };
  const oldDraft = draftName();
  const message = addMessage(item, parent, { role: "user", content: text });
  if (!item.named && parent === null) item.title = titleOf(text);
  if (!answer(item, message.id)) {
    delete item.messages[message.id];
    Object.assign(item, before);
    return false;
  }
  if (text === input.value) remember(oldDraft, null);
  history.replaceState(null, "", `#${item.id}`);
  return true;
}

function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 59)}…` : line;
}

const thread = new Thread($("#thread"), {
  isComing: (message) => runs.get(chat.id)?.message === message,
  again: (message) => again(chat, message),
  askKey: () => enterKey("Requests are sent with this key.", loadModels),
  edited: () => saveSoon(chat),
  choose: (message) => goTo(newestLeaf(chat, message.id)),
  reopen: (message) => goTo(message.id, message),
  edit(message, text) {
    if (message.role === "user") return submit(chat, message.parent, text);
    if (busy(chat)) return false;
    const { id, parent, error, stats, ...fields } = message;
    addMessage(chat, parent, { ...fields, content: text, finish: "stop" });
    save(chat);
    showChat();
    return true;
  },
  results(message, calls, texts) {
    if (busy(chat)) return;
    let parent = message.id;
    calls.forEach((call, i) => {
      parent = addMessage(chat, parent, { role: "tool", tool_call_id: call.id, content: texts[i] }).id;
    });
    if (!answer(chat, parent)) chat.head = message.id;
    thread.refresh(message);
  },
});

/** Shows another branch. */
function goTo(head) {
  if (runs.has(chat.id)) return toast("An answer is coming in: stop it first");
  chat.head = head;
  thread.refreshAll();
  showChat();
  return save(chat);
}

const settings = new SettingsDialog({
  changed: () => {
    saveSoon(chat);
    showChat();
  },
  keep: (values) => toast(remember("settings", JSON.stringify(values))
    ? "New chats begin with these settings" : "The browser's storage is full or off"),
  askForKey: () => enterKey("Requests are sent with this key.", loadModels),
});

// --- server -------------------------------------------------------------------------------------

function notice(text) {
  $("#notice").replaceChildren(...(text ? [h("span", {}, text),
    h("button", { type: "button", onclick: () => notice("") }, "Close")] : []));
}

/** A notice about the server, which goes by itself when all is well again. */
function trouble(text) {
  troubled = text !== "";
  notice(text);
}

async function enterKey(why, then) {
  const entered = await askKey(why, key, recall("key") !== null);
  if (!entered) return;
  key = entered.key || null;
  if (!remember("key", entered.keep ? key : null)) toast("The browser's storage is full or off");
  await loadModels();
  if (then !== loadModels) then();
}

async function loadModels() {
  try {
    const names = await listModels(key);
    $("#model").replaceChildren(...names.map((name) => h("option", { value: name }, name)));
    chooseModel(chat.model);
    if (!names.length) trouble("The server has no model. Start it with one.");
    else if (troubled) trouble("");
  } catch (error) {
    if (error.kind === "key") {
      trouble("This server wants an API key.");
      enterKey(error.message, loadModels);
    } else {
      trouble(error.message);
      setTimeout(waitForServer, 2000);
    }
  }
}

async function waitForServer() {
  if (await isUp()) loadModels();
  else setTimeout(waitForServer, 2000);
}

/** The chat's model, else the last one chosen, else the first. */
function chooseModel(wanted) {
  const select = $("#model");
  const names = [...select.options].map((option) => option.value);
  select.value = [wanted, recall("model")].find((name) => names.includes(name)) ?? names[0];
}

// --- controls -----------------------------------------------------------------------------------

function editLast() {
  const last = pathTo(chat, chat.head).findLast((message) => message.role === "user");
  if (last && !runs.has(chat.id)) thread.edit(last);
}

const openSettings = () => settings.open(chat.settings);
const openHelp = () => $("#help").showModal();
const SHORTCUTS = { O: startChat, b: toggleSidebar, ".": openSettings, "/": openHelp };

document.addEventListener("keydown", (event) => {
  if (event.isComposing || $("dialog[open]")) return;
  const name = event.shiftKey && event.key.length === 1 ? event.key.toUpperCase() : event.key;
  if (event.key === "Escape") {
    if (uncover()) $("#menu").focus();
    else stop();
  } else if ((event.ctrlKey || event.metaKey) && !event.altKey && Object.hasOwn(SHORTCUTS, name)) {
    event.preventDefault();
    SHORTCUTS[name]();
  }
});

input.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !input.value) {
    event.preventDefault();
    editLast();
  }
});
input.addEventListener("input", () => {
  grow(input);
  remember(draftName(), input.value || null);
});
$("#composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (runs.has(chat.id)) stop();
  else send();
});
$("#model").onchange = (event) => {
  remember("model", event.target.value);
  chat.model = event.target.value;
};
$("#new").onclick = startChat;
$("#menu").onclick = toggleSidebar;
$("#shade").onclick = toggleSidebar;
$("#sidebar-close").onclick = toggleSidebar;
$("#theme").onclick = switchTheme;
$("#settings-open").onclick = openSettings;
$("#help-open").onclick = openHelp;
$("#export").onclick = () => exportChats([...chats.values()], "chats");
$("#import").onclick = () => $("#file").click();
$("#file").onchange = (event) => {
  if (event.target.files[0]) importFile(event.target.files[0]);
  event.target.value = "";
};
$("#examples").append(...EXAMPLES.map(([name, text]) => h("li", {}, h("button", {
  type: "button",
  onclick: () => {
    input.value = text;
    grow(input);
    input.focus();
  },
}, h("strong", {}, name), h("span", {}, text)))));

addEventListener("hashchange", () => chats.has(location.hash.slice(1)) && openChat(chats.get(location.hash.slice(1))));
addEventListener("pagehide", () => runs.forEach((run, id) => chats.has(id) && saveChat(chats.get(id))));
addEventListener("storage", (event) => {
  const id = idOfKey(event.key);
  if (id === null || runs.has(id)) return;
  try {
    if (event.newValue === null) chats.delete(id);
    else chats.set(id, loadChat(id));
  } catch {
    return; // written by another version of this page
  }
  if (id === chat.id && chats.has(id)) chat = chats.get(id);
  showChat();
});

showSidebar(!narrow.matches);
openChat(chats.get(location.hash.slice(1)) ?? newChat(defaults()));
loadModels();
if (!narrow.matches) input.focus();
if (broken) notice(`${broken} stored chats cannot be read. They stay in the browser's storage.`);
