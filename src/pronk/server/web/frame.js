// What is around the chat: scrolling, the list at the side, colours.

import { $ } from "./dom.js";
import { remember } from "./store.js";

export const narrow = matchMedia("(max-width: 52rem)");

/** Keeps `box` at its end while `content` grows, until somebody scrolls up. */
export class Follower {
  constructor(box, content, button) {
    this.box = box;
    this.pinned = true;
    this.top = 0;
    box.addEventListener("scroll", () => {
      const { scrollTop, scrollHeight, clientHeight } = box;
      const left = scrollHeight - clientHeight - scrollTop;
      if (left < 8) this.pinned = true;
      else if (scrollTop < this.top) this.pinned = false;
      this.top = scrollTop;
      button.hidden = this.pinned || left < 120;
    }, { passive: true });
    const watcher = new ResizeObserver(() => this.#follow());
    watcher.observe(content);
    watcher.observe(box);
    button.onclick = () => this.toEnd();
  }

  toEnd() {
    this.pinned = true;
    this.#follow();
  }

  #follow() {
    if (!this.pinned) return;
    this.box.scrollTop = this.box.scrollHeight;
    this.top = this.box.scrollTop; // content that shrinks moves it up, which nobody's hand did
  }
}

const isOpen = () => document.body.classList.contains("sidebar");

export function showSidebar(open) {
  document.body.classList.toggle("sidebar", open);
  $("#sidebar").inert = !open;
  $("main").inert = open && narrow.matches; // the list lies over it
  $("#menu").setAttribute("aria-expanded", String(open));
}

export function toggleSidebar() {
  const open = !isOpen();
  showSidebar(open);
  if (narrow.matches) (open ? $("#new") : $("#menu")).focus();
}

/** Closes the list where it covers the chat; whether it did. */
export function uncover() {
  if (!narrow.matches || !isOpen()) return false;
  showSidebar(false);
  return true;
}

/** The other colours; back at the system's own they follow the system again. */
export function switchTheme() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const next = (root.dataset.theme ?? system) === "dark" ? "light" : "dark";
  remember("theme", next === system ? null : next);
  if (next === system) delete root.dataset.theme;
  else root.dataset.theme = next;
}

narrow.addEventListener("change", () => showSidebar(!narrow.matches));
