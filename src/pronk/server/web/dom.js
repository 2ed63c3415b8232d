// Small helpers around the DOM. Text always goes in as text: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  copy: "M9 9h10v10H9zM15 9V5H5v10h4",
  check: "M5 12.5 10 17 19 7",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  again: "M19 12a7 7 0 1 1-2-5l2 2M19 4v5h-5",
  left: "M14 7l-5 5 5 5",
  right: "M10 7l5 5-5 5",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  tool: "M14.5 6.5a4 4 0 0 0-5 5L4 17l3 3 5.5-5.5a4 4 0 0 0 5-5L15 12l-3-3z",
  alert: "M12 8v5M12 16.5v.01M12 3 2.5 20h19z",
};

export const $ = (selector, root = document) => root.querySelector(selector);

/** An element. Properties are set as properties, or as attributes where there is none; `on...`
 *  are listeners; children are nodes or texts, and null ones are left out. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null));
  return element;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button that is an icon; `label` is read aloud and shown as its tip. */
export function iconButton(name, label, onclick, props = {}) {
  const attributes = { type: "button", className: "icon", title: label, onclick, ...props };
  return h("button", { ...attributes, "aria-label": label }, icon(name));
}

/** A button that copies what `text()` returns. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const done = await copy(text());
    button.replaceChildren(icon(done ? "check" : "alert"));
    toast(done ? "Copied" : "The browser did not let this page copy");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** The clipboard's interface exists on https and localhost only; elsewhere the old command. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = h("textarea", { value: text, className: "hidden", "aria-hidden": "true" });
    const focused = document.activeElement;
    (focused?.closest("dialog") ?? document.body).append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return done;
  }
}

/** A short word at the bottom of the page, with a button where `action` is {label, run}. */
export function toast(text, action = null) {
  const bar = $("#toast");
  const button = action && h("button", {
    type: "button",
    onclick: () => {
      bar.replaceChildren();
      action.run();
    },
  }, action.label);
  bar.replaceChildren(h("span", {}, text), ...(button ? [button] : []));
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => bar.replaceChildren(), action ? 8000 : 3000);
}

/** Gives a text to screen readers; each call adds a piece. */
export function announce(text, fresh = false) {
  const region = $("#live");
  if (fresh) region.replaceChildren();
  if (text.trim()) region.append(h("p", {}, text));
}

/** A text area as high as its text, as far as the style sheet allows. */
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

/** Lets the browser save a text as a file. */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
