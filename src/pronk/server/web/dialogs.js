// The dialogs: settings of a chat, API key, name of a chat. They are <dialog> elements, so focus
// stays inside, Escape closes them, and focus goes back to where it was.

import { $, h } from "./dom.js";
import { EMPTY, readSettings } from "./request.js";

const EXAMPLE_TOOL = [{ type: "function", function: { name: "get_weather",
  description: "The weather in a city right now",
  parameters: { type: "object", properties: {
    city: { type: "string", description: "Name of the city" },
    unit: { type: "string", enum: ["celsius", "fahrenheit"] } }, required: ["city"] } } }];

// Chromium gives a text box its focus back without its caret: what is typed then goes nowhere.
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("close", () => {
    const focused = document.activeElement;
    if (focused instanceof HTMLTextAreaElement) {
      focused.blur();
      focused.focus();
    }
  });
}

/** The value of the button that closed the dialog, "" for Escape. */
function ask(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
  });
}

/** {key, keep}, or null when nobody entered one. */
export async function askKey(why, current, kept) {
  const dialog = $("#key");
  if (dialog.open) return null;
  const { key, keep } = $("form", dialog).elements;
  $("#key-why").textContent = why;
  key.value = current ?? "";
  keep.checked = kept;
  const pressed = await ask(dialog);
  const value = key.value.trim();
  key.value = "";
  return pressed === "cancel" || pressed === "" ? null : { key: value, keep: keep.checked };
}

/** What to do with a chat: {action: save, export, delete or "", name}. */
export async function askChat(chat) {
  const dialog = $("#chat");
  const { name } = $("form", dialog).elements;
  name.value = chat.title;
  name.select();
  const action = await ask(dialog);
  return { action, name: name.value.trim() };
}

/** Settings take effect as they are typed: there is nothing to lose by closing the dialog. What is
 *  not right yet stays in its field, marked, and stops the next message, not the typing. */
export class SettingsDialog {
  constructor({ changed, keep, askForKey }) {
    this.dialog = $("#settings");
    this.form = $("form", this.dialog);
    this.changed = changed;
    this.settings = null;
    for (const name of Object.keys(EMPTY)) {
      const problem = h("small", { className: "problem", id: `problem-${name}` });
      this.form.elements[name].after(problem);
    }
    const take = ({ target }) => {
      if (!Object.hasOwn(EMPTY, target.name)) return;
      this.settings[target.name] = target.value;
      this.#check();
      this.changed();
    };
    this.form.addEventListener("input", take);
    this.form.addEventListener("change", take); // selects, in some browsers
    $("#example-tool").onclick = () => this.#insert("tools", JSON.stringify(EXAMPLE_TOOL, null, 2));
    $("#clear-settings").onclick = () => {
      Object.assign(this.settings, EMPTY);
      this.#fill();
      this.changed();
    };
    $("#keep-settings").onclick = () => keep(this.settings);
    $("#key-open").onclick = askForKey;
  }

  /** Opens the dialog, at the first field that is wrong if there is one. */
  open(settings) {
    this.settings = settings;
    this.#fill();
    this.dialog.showModal();
    $("[aria-invalid=true]", this.form)?.focus();
  }

  #fill() {
    for (const name of Object.keys(EMPTY)) {
      this.form.elements[name].value = this.settings[name] ?? EMPTY[name];
    }
    this.#check();
  }

  #check() {
    const { errors } = readSettings(this.settings);
    $("#schema-field").hidden = this.settings.format !== "json_schema";
    for (const name of Object.keys(EMPTY)) {
      const field = this.form.elements[name];
      const wrong = name in errors;
      $(`#problem-${name}`).textContent = errors[name] ?? "";
      field.setAttribute("aria-invalid", String(wrong));
      if (wrong) field.setAttribute("aria-describedby", `problem-${name}`);
      else field.removeAttribute("aria-describedby");
    }
  }

  /** Adds a tool to what is there, or begins with it where that cannot be read. */
  #insert(name, text) {
    const field = this.form.elements[name];
    if (field.value.trim()) return field.focus();
    field.value = this.settings[name] = text;
    field.setSelectionRange(0, 0);
    this.#check();
    this.changed();
    return field.focus();
  }
}
