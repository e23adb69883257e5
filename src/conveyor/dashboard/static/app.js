// The shell, what every page uses, and the overview. One file, so that the first view needs five requests; the other pages
// are loaded when they are opened.
import { html, render, useEffect, useLayoutEffect, useMemo, useRef, useState } from "./vendor/preact-htm.js";

export { html, useEffect, useLayoutEffect, useMemo, useRef, useState };

// ---- format ---------------------------------------------------------------------------------------------------------

/** Write a count: 1,204; from a million on 1.2M. By hand: the first Intl.NumberFormat of a page takes a fifth of its first view. */
export function num(n) {
  if (n == null) return "–";
  if (Math.abs(n) < 999_999.5) return String(Math.round(n)).replace(/\B(?=(\d{3})+$)/g, ",");
  let part = n / 1e6, unit = 0;
  while (unit < 2 && Math.abs(part) >= 999.95) { part /= 1000; unit += 1; }
  return part.toFixed(1).replace(/\.0$/, "") + "MBT"[unit];
}

/** Write a number of jobs and what they are or become: 1 job is ready, 2 jobs are ready. */
export const jobs = (n, what = "") => `${num(n)} job${n === 1 ? "" : "s"} ${n === 1 ? what.replace(/^are\b/, "is").replace(/^become\b/, "becomes") : what}`.trim();

/** Write a rate a second: 0.4, 12, 1,204. */
export const rate = (n) => (n == null ? "–" : n === 0 ? "0" : n < 10 ? n.toFixed(1) : num(n));

/** Write a duration that is given in ms as the sentences of the server do: 340 ms, 1.2 s, 3 m 20 s, 2 h 5 m, 3 d 4 h. */
export function span(ms) {
  if (ms == null) return "–";
  if (ms < 0) ms = 0;
  if (ms < 1) return "0 ms";
  if (ms < 1000) return `${Math.round(ms)} ms`;
  const s = ms / 1000;
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 60) return `${Math.round(s)} s`;
  const m = Math.floor(s / 60);
  if (m < 60) return pair(m, "m", Math.floor(s % 60), "s");
  const hours = Math.floor(m / 60);
  return hours < 24 ? pair(hours, "h", m % 60, "m") : pair(Math.floor(hours / 24), "d", hours % 24, "h");
}
const pair = (a, x, b, y) => (b ? `${a} ${x} ${b} ${y}` : `${a} ${x}`);

/** Write a share in per cent; nothing of nothing is 0. */
export const percent = (part, of) => {
  const share = of ? (100 * part) / of : 0;
  return `${share > 0 && share < 10 ? share.toFixed(1) : Math.round(share)} %`;
};

/** Write a number of bytes. */
export function bytes(n) {
  if (n == null) return "–";
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (n < 1000) return `${n < 10 && unit !== "B" ? n.toFixed(1) : Math.round(n)} ${unit}`;
    n /= 1000;
  }
  return `${n.toFixed(1)} TB`;
}

/** Return an instant, a number of ms or ISO text, in ms; null without one. */
export const ms = (at) => (at == null || at === "" ? null : typeof at === "number" ? at : Date.parse(at));

// What turns the direction of text, breaks lines or is not seen: a program, or somebody who feeds it, would say one thing and mean another.
const UNSEEN = /[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
/** Write the characters of *text* that are not seen, or that turn what stands beside them, as their numbers: \u202e. */
export const shown = (text) => String(text ?? "").replace(UNSEEN, (sign) => `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`);

const STATES = { leased: "running", done: "done", dead: "dead" };
/** The word for a state that people read. */
export const stateWord = (state) => STATES[state] ?? state;

/** Name a job in few characters: the end of its id, which differs. */
export const shortId = (id) => {
  const text = String(id ?? "").replace(/^[^:]*:/, "");
  return text.length > 14 ? `…${text.slice(-10)}` : text;
};

// ---- settings of this browser ---------------------------------------------------------------------------------------

const stored = (() => {
  try { return JSON.parse(localStorage.getItem("conveyor") ?? "{}") ?? {}; } catch { return {}; }
})();
const settings = { theme: "auto", every: 1, times: "ago", keys: true, ...stored };

function applyTheme() {
  if (settings.theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = settings.theme;
}
applyTheme();

/** Keep a setting for this browser. */
export function setSetting(name, value) {
  settings[name] = value;
  try { localStorage.setItem("conveyor", JSON.stringify(settings)); } catch { /* a private window keeps none */ }
  applyTheme();
  if (name === "every") live.restart();
  settingsChanged.emit();
}
export const getSettings = () => settings;

// ---- values that components follow ----------------------------------------------------------------------------------

function signal() {
  const listeners = new Set();
  return {
    emit: () => listeners.forEach((listener) => listener()),
    on(listener) { listeners.add(listener); return () => listeners.delete(listener); },
  };
}
/** Draw the component again whenever *source* tells of a change. */
function useSignal(source) {
  const [, draw] = useState(0);
  useEffect(() => source.on(() => draw((n) => n + 1)), [source]);
}
const settingsChanged = signal();
const second = signal();
setInterval(() => document.hidden || second.emit(), 1000);

// ---- API ------------------------------------------------------------------------------------------------------------

/** The path that the dashboard is mounted at; it ends in a slash. */
const base = document.querySelector("meta[name=base]").content;
const apiUrl = (path) => `${base}api/v1/${path}`;

/** An answer of the server that is not a success; its message is meant to be read. */
export class ApiError extends Error {
  constructor(status, error) {
    super(error?.message ?? `The server answered ${status}.`);
    Object.assign(this, { status, code: error?.code ?? "", position: error?.position ?? null });
  }
}

async function request(method, path, body) {
  let answer;
  try {
    answer = await fetch(apiUrl(path), {
      method,
      credentials: "same-origin",
      headers: { Accept: "application/json", ...(body === undefined ? {} : { "Content-Type": "application/json" }) },
      body: typeof body === "string" || body === undefined ? body : JSON.stringify(body),
    });
  } catch {
    throw new ApiError(0, { message: "The dashboard's server does not answer." });
  }
  let content = null;
  try { content = await answer.json(); } catch { /* an answer without a body, or of a proxy */ }
  if (!answer.ok) throw new ApiError(answer.status, content?.error ?? content);
  if (content == null) throw new ApiError(401, { message: "Another page answered in place of the dashboard: perhaps your login has ended. Reload the page." });
  return content;
}

/** The API: paths are relative to api/v1/. A body that is text is sent as it is: numbers in it keep all their digits. */
export const api = {
  get: (path) => request("GET", path),
  post: (path, body = {}) => request("POST", path, body),
};

/** Write a query string of the values that are set. */
export function query(values) {
  const parts = Object.entries(values).filter(([, value]) => value != null && value !== "" && value !== false);
  return parts.length ? `?${new URLSearchParams(parts)}` : "";
}

// ---- live snapshot --------------------------------------------------------------------------------------------------

const changed = signal();
/**
 * The snapshot of the whole, kept current by server-sent events, or by polling where those do not pass. `session`: who looks
 * and what they may do. `history`: the last hour, which comes with the stream.
 */
export const live = {
  data: null,
  session: null,
  history: null,
  state: "connecting",
  message: "",
  offset: 0,
  source: null,
  timer: 0,
  failures: 0,
  now: () => Date.now() + live.offset,
  take(snapshot) {
    live.data = { ...live.data, ...snapshot };
    if (snapshot.at) live.offset = ms(snapshot.at) - Date.now();
    live.say("live");
    if (!live.session) live.askSession();
  },
  say(state, message = "") {
    Object.assign(live, { state, message });
    changed.emit();
  },
  async askSession() {
    try {
      live.session = await request("GET", "session");
      changed.emit();
    } catch (error) {
      if (error.status) live.say("lost", error.message);
    }
  },
  stop() {
    live.source?.close();
    live.source = null;
    clearTimeout(live.timer);
  },
  restart() {
    live.stop();
    if (settings.every === 0 && live.data) live.say("paused");
    else if (!document.hidden) live.listen();
  },
  listen() {
    if (!window.EventSource || live.failures > 2 || live.session?.live === "poll") { live.poll(); return; }
    const source = new EventSource(apiUrl(`stream${query({ seconds: settings.every > 1 && settings.every, history: "1h" })}`));
    const on = (name, take) => source.addEventListener(name, (event) => { live.failures = 0; take(JSON.parse(event.data)); });
    on("session", (session) => { live.session = session; changed.emit(); });
    on("snapshot", (snapshot) => { live.take(snapshot); if (settings.every === 0) live.restart(); });
    on("history", (history) => { live.history = history; changed.emit(); });
    on("away", ({ message }) => live.say("lost", message));
    source.onerror = () => {
      live.failures += 1;
      const refused = source.readyState === EventSource.CLOSED; // by a server that sends no events, which is asked instead
      if (!refused) live.say("lost");
      if (refused || live.failures > 2) {
        live.failures = 3;
        live.stop();
        live.timer = setTimeout(live.restart, refused ? 0 : 2000);
      }
    };
    live.source = source;
  },
  async poll() {
    try {
      live.take(await request("GET", "snapshot"));
      if (live.session?.live === "sse") { live.failures = 0; live.restart(); return; }
    } catch (error) { live.say("lost", error.status ? error.message : ""); }
    if (settings.every) live.timer = setTimeout(live.poll, Math.max(2, settings.every) * 1000);
  },
};
document.addEventListener("visibilitychange", () => (document.hidden ? live.stop() : live.restart()));

/** Return the live snapshot; the component is drawn again at every change of it. */
export function useLive() {
  useSignal(changed);
  return live.data;
}

/** Return over how long a time many queues were counted, one after the other, the first of them at *at*; "" for a moment. */
export const since = (at) => (at && live.now() - ms(at) > 3000 ? `, counted over the last ${span(live.now() - ms(at))}` : "");

/** Return whether the person who looks may do *action*. */
export const may = (action) => live.session?.actions?.includes(action) ?? false;

/**
 * Ask for *path* now and with every turn of the live snapshot (at least *every* ms apart, and four times as long as the last answer
 * took); what was there stays until the answer has come. While *hold* is true nothing is asked again. *load(path, show)* asks in place of
 * one request; what it gives to *show* meanwhile is drawn where nothing was there.
 */
export function useQuery(path, { every = 2000, hold = false, load = api.get } = {}) {
  const [state, setState] = useState({ path: null, data: null, error: null });
  const box = useRef({ busy: false, next: 0, path: null });
  box.current.hold = hold;
  const ask = async (force) => {
    const it = box.current;
    if (!it.path || (!force && (it.busy || it.hold || document.hidden || Date.now() < it.next))) return;
    const asked = it.path, began = Date.now();
    it.busy = true;
    try {
      const data = await load(asked, (part) => it.path === asked && setState((old) => (old.path === asked ? old : { path: asked, data: part, error: null })));
      if (it.path === asked) setState({ path: asked, data, error: null });
    } catch (error) {
      if (it.path === asked) setState((old) => ({ path: asked, data: old.path === asked ? old.data : null, error }));
    } finally {
      it.busy = false;
      it.next = began + Math.max(every, 5 * (Date.now() - began));
    }
  };
  useEffect(() => {
    box.current.path = path;
    ask(true);
    return () => { box.current.path = null; };
  }, [path]);
  useEffect(() => changed.on(() => live.state === "live" && ask(false)), []);
  return { ...state, stale: state.path !== path, again: () => ask(true) };
}

// ---- router ---------------------------------------------------------------------------------------------------------

const moved = signal();

/** Return the address of a page from its path and query, both below the dashboard's root. */
export const href = (path, values) => base + path + (values ? query(values) : "");
/** Return the address of a job's page. Ids and names stand in the query: proxies change an encoded slash in a path. */
export const jobHref = (id) => href("job", { id });
/** Return the address of a queue's page. */
export const queueHref = (name) => href("queue", { name });
/** Return the address of the list of jobs that a filter chooses. */
export const jobsHref = (filter) => href("jobs", { filter });
/** Write one term of a filter; a value with blanks or quotes is quoted. */
export const term = (name, value) => `${name}:${/^[\w.*:/@+~-]+$/.test(value) ? value : JSON.stringify(String(value))}`;

/** Open a page. */
export function go(address, { replace = false } = {}) {
  history[replace ? "replaceState" : "pushState"](null, "", address);
  moved.emit();
}
window.addEventListener("popstate", moved.emit);
document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[href]");
  if (!link || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey || link.target || link.hasAttribute("download")) return;
  const url = new URL(link.href);
  if (url.origin !== location.origin || !url.pathname.startsWith(base) || /^(static|api|metrics)\b/.test(url.pathname.slice(base.length))) return;
  event.preventDefault();
  if (url.href !== location.href) go(url.href);
});

/**
 * Return the value of *name* in the address, one of *options*, and what changes it there: a view that was chosen is in a link that is
 * shared, and there again after the back button.
 */
export function useParam(name, fallback, options) {
  useSignal(moved);
  const given = new URLSearchParams(location.search).get(name);
  const set = (value) => {
    const url = new URL(location.href);
    if (value === fallback) url.searchParams.delete(name);
    else url.searchParams.set(name, value);
    go(url.href, { replace: true });
  };
  return [given != null && (!options || options.some(([key]) => key === given)) ? given : fallback, set];
}

function currentRoute() {
  const values = Object.fromEntries(new URLSearchParams(location.search));
  const page = location.pathname.slice(base.length).replace(/\/$/, "");
  return { page, arg: page === "job" ? values.id ?? "" : page === "queue" ? values.name ?? "" : "", query: values };
}

// ---- parts ----------------------------------------------------------------------------------------------------------

const PATHS = {
  overview: "M2 9h4v5H2zM8 2h4v12H8zM14 6h0",
  home: "M2 2h5v6H2zM9 2h5v3H9zM9 7h5v7H9zM2 10h5v4H2z",
  queues: "M2 4h12M2 8h12M2 12h8",
  jobs: "M3 2.5h10v11H3zM5.5 6h5M5.5 9h5",
  failures: "M8 2l6.5 11.5h-13zM8 6.5v3.2M8 11.6v.1",
  schedules: "M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12zM8 4.8V8l2.4 1.6",
  workers: "M2.5 3h11v4h-11zM2.5 9h11v4h-11zM5 5h.1M5 11h.1",
  limits: "M2.5 12a5.5 5.5 0 1 1 11 0M8 12l2.6-3.6",
  topics: "M8 8m-1.6 0a1.6 1.6 0 1 0 3.2 0a1.6 1.6 0 1 0 -3.2 0M4.5 11.5a5 5 0 0 1 0-7M11.5 4.5a5 5 0 0 1 0 7",
  redis: "M2.5 4.5c0-1.3 2.4-2.3 5.5-2.3s5.5 1 5.5 2.3-2.4 2.3-5.5 2.3-5.5-1-5.5-2.3zM2.5 4.5v7c0 1.3 2.4 2.3 5.5 2.3s5.5-1 5.5-2.3v-7M2.5 8c0 1.3 2.4 2.3 5.5 2.3s5.5-1 5.5-2.3",
  audit: "M8 2l5 1.8v4c0 3-2.1 5-5 6.2C5.1 12.8 3 10.8 3 7.8v-4zM5.8 7.8l1.6 1.6 2.900-3",
  search: "M7 12A5 5 0 1 0 7 2a5 5 0 0 0 0 10zM10.6 10.6L14 14",
  menu: "M2 4h12M2 8h12M2 12h12",
  theme: "M8 14A6 6 0 1 0 8 2a6 6 0 0 0 0 12zM8 2v12",
  more: "M6 3l5 5-5 5",
  pause: "M5.5 3v10M10.5 3v10",
  play: "M4.5 3l8 5-8 5z",
  copy: "M5.5 5.5h8v8h-8zM10.5 5.5v-3h-8v8h3",
  check: "M3 8.5l3.2 3.2L13 4.8",
};
/** A small picture; decorative, so that readers skip it. */
export const Icon = ({ name, size = 16 }) => html`<svg width=${size} height=${size} viewBox="0 0 16 16" fill="none" stroke="currentColor" stroke-width="1.5" stroke-linecap="round" stroke-linejoin="round" aria-hidden="true"><path d=${PATHS[name]} /></svg>`;

/** A state as a dot and a word. */
export const State = ({ value, text }) => html`<span class="state" data-state=${value}>${text ?? stateWord(value)}</span>`;

/** An instant, as the person chose: how long ago, local time or UTC. Its title has the other forms. */
export function Time({ at, empty = "–" }) {
  useSignal(settingsChanged);
  useSignal(second);
  const t = ms(at);
  if (t == null || Number.isNaN(t)) return html`<span class="muted">${empty}</span>`;
  const distance = live.now() - t;
  const ago = Math.abs(distance) < 1000 ? "now" : distance < 0 ? `in ${span(-distance)}` : `${span(distance)} ago`;
  const text = settings.times === "ago" ? ago : clockText(t);
  return html`<time class="nowrap" datetime=${new Date(t).toISOString()} title=${[settings.times !== "ago" && ago, clocks(t)].filter(Boolean).join(" · ")}>${text}</time>`;
}
/** Write an instant by the clock of this browser and by that of UTC. */
export const clocks = (t) => (new Date(t).getTimezoneOffset() ? `${clockText(t, false)} local · ` : "") + clockText(t, true);
const two = (n) => String(n).padStart(2, "0");
/** Write an instant by the clock; the day too unless it is today. */
export function clockText(t, utc = settings.times === "utc") {
  const d = new Date(t);
  const p = utc
    ? [d.getUTCFullYear(), d.getUTCMonth() + 1, d.getUTCDate(), d.getUTCHours(), d.getUTCMinutes(), d.getUTCSeconds()]
    : [d.getFullYear(), d.getMonth() + 1, d.getDate(), d.getHours(), d.getMinutes(), d.getSeconds()];
  return `${p[0]}-${two(p[1])}-${two(p[2])} ${two(p[3])}:${two(p[4])}:${two(p[5])}${utc ? " UTC" : ""}`;
}
/** How long something lasts that goes on, drawn again each second. */
export function Elapsed({ since }) {
  useSignal(second);
  return html`<span class="nowrap">${since == null ? "–" : span(live.now() - ms(since))}</span>`;
}

/** A number in a table; nought is muted. */
export const Count = ({ n, state }) => (n ? html`<span data-state=${state} style=${state ? { color: "var(--c)" } : null}>${num(n)}</span>` : html`<span class="zero">${n == null ? "–" : "0"}</span>`);

/** How much of something is used. */
export const Meter = ({ used, most, label, state = "leased" }) => html`<span class="meter" role="img" aria-label=${label ?? `${used} of ${most}`} data-state=${state}><i style=${{ width: `${most ? Math.min(100, (100 * used) / most) : 0}%` }}></i></span>`;

/** The slots of workers in a tile, and how many of them are used; nothing where nobody has any. */
export const Slots = ({ of }) => of?.total > 0 && html`<div class="note" title=${of.exact === false ? "At least: not all queues were read that use these slots" : null}>${of.exact === false ? "≥ " : ""}${num(of.used)} of ${num(of.total)} slots<${Meter} used=${of.used} most=${of.total} label=${`${of.used} of ${of.total} slots used`} /></div>`;

/** A card with a heading. */
export const Card = ({ title, side, children, body = true, label }) => html`<section class="card" aria-label=${title ?? label}>${title && html`<header><h2>${title}</h2>${side}</header>`}${body ? html`<div class="body">${children}</div>` : children}</section>`;

/** What to say where nothing is yet: what would stand here, and the line that brings it. */
export const Empty = ({ title, children, code }) => html`<div class="empty"><strong>${title}</strong>${children && html`<p>${children}</p>`}${code && html`<pre tabindex="0">${code}</pre>`}</div>`;

/** An error of the API, or nothing. */
export const Problem = ({ error }) => error?.message && html`<div class="problem" role="alert">${error.code && html`<strong>${error.code} </strong>`}${error.message}</div>`;

/** A page's head: its title, what it is about, its buttons. */
export function Head({ title, crumb, sub, children }) {
  useEffect(() => { document.title = `${title} · Conveyor`; }, [title]);
  return html`<div class="head"><div>${crumb && html`<div class="crumb">${crumb}</div>`}<h1 tabindex="-1">${title}</h1>${sub && html`<div class="sub">${sub}</div>`}</div>${children && html`<div class="row">${children}</div>`}</div>`;
}

/** What *query* answered, drawn by *children*; before it a quiet word, and its error above what was there. */
export function Answer({ of, children }) {
  const said = live.state === "lost" && [0, 503].includes(of.error?.status); // at the head of every page, once
  const error = said ? null : of.error;
  return html`${error && html`<${Problem} error=${error} />`}${of.data ? children(of.data) : !error && html`<div class="loading" role="status">Loading …</div>`}`;
}

/**
 * A table. *columns*: `{name, title, cell(row), num, tall, sort(row), hide}`; `tall` ones are left out on a phone. With
 * *chosen* (a Set) and *onChoose* each row has a box. What *below(row)* returns, if anything, stands in a row of its own under it.
 */
export function Table({ label, columns, rows, keyOf, chosen, onChoose, order, below }) {
  const [sorting, setSorting] = useState(order ?? null);
  const shown = columns.filter((column) => !column.hide);
  const by = sorting && shown.find((column) => column.name === sorting.name);
  const sorted = by?.sort ? [...rows].sort((a, b) => compare(by.sort(a), by.sort(b)) * (sorting.down ? -1 : 1)) : rows;
  const all = chosen && rows.length > 0 && rows.every((row) => chosen.has(keyOf(row)));
  const toggle = (keys, on) => {
    const next = new Set(chosen);
    keys.forEach((key) => (on ? next.add(key) : next.delete(key)));
    onChoose(next);
  };
  const kind = (column) => `${column.num ? "num" : ""} ${column.tall ? "tall" : ""} ${column.kind ?? ""}`;
  return html`<div class="scroll" tabindex="0" role="group" aria-label=${label}><table>
    <thead><tr>
      ${chosen && html`<th style=${{ width: "1%" }}><input type="checkbox" aria-label="Choose all on this page" checked=${all} onChange=${(e) => toggle(rows.map(keyOf), e.target.checked)} /></th>`}
      ${shown.map((column) => html`<th class=${kind(column)} scope="col" aria-sort=${by === column ? (sorting.down ? "descending" : "ascending") : null}>
        ${column.sort ? html`<button class="sort" onClick=${() => setSorting({ name: column.name, down: by === column ? !sorting.down : Boolean(column.num) })}>${column.title}${by === column ? (sorting.down ? " ↓" : " ↑") : ""}</button>` : column.title || html`<span class="hidden">${column.name}</span>`}
      </th>`)}
    </tr></thead>
    <tbody>${sorted.flatMap((row) => {
      const key = keyOf(row), under = below?.(row);
      return [html`<tr key=${key} class=${chosen?.has(key) ? "chosen" : null}>
        ${chosen && html`<td><input type="checkbox" aria-label=${`Choose ${key}`} checked=${chosen.has(key)} onChange=${(e) => toggle([key], e.target.checked)} /></td>`}
        ${shown.map((column) => html`<td class=${kind(column)}>${column.cell(row)}</td>`)}
      </tr>`, under && html`<tr key=${`${key} below`} class="below"><td colspan=${shown.length}>${under}</td></tr>`];
    })}</tbody>
  </table></div>`;
}
const compare = (a, b) => (a == null ? -1 : b == null ? 1 : a < b ? -1 : a > b ? 1 : 0);

/** A line of values without axes. */
export function Spark({ values, label, width = 96, height = 24, state = "leased" }) {
  if (!values?.length) return html`<span class="muted">–</span>`;
  const most = Math.max(1, ...values.map((v) => v ?? 0));
  const step = width / Math.max(1, values.length - 1);
  const points = values.map((v, i) => `${(i * step).toFixed(1)},${(height - 2 - ((v ?? 0) / most) * (height - 4)).toFixed(1)}`).join(" ");
  return html`<svg class="spark" width=${width} height=${height} role="img" aria-label=${label} data-state=${state} style=${{ color: "var(--c)" }}><polyline points=${points} fill="none" stroke="currentColor" stroke-width="1.5" stroke-linejoin="round" /></svg>`;
}

// ---- charts ---------------------------------------------------------------------------------------------------------

const pointed = { ...signal(), at: null };
const NICE = [1, 2, 2.5, 5, 10];
const SPANS = [1e3, 2e3, 5e3, 1e4, 2e4, 3e4, 6e4, 12e4, 3e5, 6e5, 12e5, 18e5, 36e5, 72e5, 216e5, 432e5, 864e5];
const STEPS = [60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400];

/** Return the steps of an axis from 0 that reaches *most* in at most four. */
function ticks(most, times) {
  const rough = Math.max(most, 1e-9) / 3;
  const long = times && rough > 500 && (SPANS.find((ms) => ms >= rough) ?? Math.ceil(rough / 864e5) * 864e5); // a round number of ms is none of minutes
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = long || Math.max(1, NICE.find((n) => n * power >= rough) * power);  // whole jobs, whole milliseconds
  return Array.from({ length: Math.ceil(most / step - 1e-9) + 1 }, (_, i) => i * step);
}

/**
 * A chart over time. *series*: `{name, kind, values, columns}`: columns are stacked, the others are lines with gaps where a value
 * is null. The cursors of all charts on a page move together; the legend has the numbers, so nothing moves. A hidden table says the last values.
 */
export function Chart({ label, start, step, series, unit = num, height = 180, marks = [] }) {
  const box = useRef(null);
  const [width, setWidth] = useState(0);
  useSignal(pointed);
  useSignal(settingsChanged);
  useLayoutEffect(() => {
    const watcher = new ResizeObserver(([entry]) => setWidth(Math.floor(entry.contentRect.width)));
    watcher.observe(box.current);
    return () => watcher.disconnect();
  }, []);
  const n = Math.max(1, ...series.map((one) => one.values.length));
  const columns = series.filter((one) => one.columns);
  const sums = Array.from({ length: n }, (_, i) => columns.reduce((sum, one) => sum + (one.values[i] ?? 0), 0));
  const most = Math.max(...sums, ...series.filter((one) => !one.columns).flatMap((one) => one.values.map((v) => v ?? 0)), 0);
  const grid = ticks(most || 1, unit === span);
  const top = grid[grid.length - 1];
  const left = 52, right = 8, above = 8, below = 22;
  const w = Math.max(10, width - left - right), hgt = height - above - below;
  const x = (i) => left + ((i + 0.5) / n) * w;
  const y = (v) => above + hgt - (v / top) * hgt;
  const atX = (seconds) => left + ((seconds - start) / (n * step)) * w;
  const every = STEPS.find((s) => (n * step) / s <= Math.max(2, w / 76)) ?? 86400;
  const zone = settings.times === "utc" ? 0 : new Date(start * 1000).getTimezoneOffset() * 60;
  const first = Math.ceil((start - zone) / every) * every + zone;
  const labels = Array.from({ length: Math.max(0, Math.floor((start + n * step - first) / every) + 1) }, (_, i) => first + i * every);
  const at = pointed.at == null ? null : Math.floor((pointed.at - start) / step);
  const index = at != null && at >= 0 && at < n ? at : null;
  const point = (event) => {
    const place = (event.clientX - box.current.getBoundingClientRect().left - left) / w;
    pointed.at = place < 0 || place > 1 ? null : start + place * n * step;
    pointed.emit();
  };
  const leave = () => { pointed.at = null; pointed.emit(); };
  const line = (values) => values.map((v, i) => (v == null ? "" : `${values[i - 1] == null ? "M" : "L"}${x(i).toFixed(1)},${y(v).toFixed(1)}`)).join("");
  const dots = (values) => values.map((v, i) => (v == null || values[i - 1] != null || values[i + 1] != null ? "" : `M${x(i).toFixed(1)},${y(v).toFixed(1)}h.01`)).join(""); // no line leads to them
  const heights = new Array(n).fill(0);
  const column = Math.max(1, (w / n) * 0.72);
  const bars = (values) => values.map((v, i) => { // one element for all of a series: a bar for each is most of what a page draws
    if (!v) return "";
    const from = y(heights[i]);
    const to = y((heights[i] += v));
    return `M${(x(i) - column / 2).toFixed(1)},${to.toFixed(1)}h${column.toFixed(1)}v${Math.max(0.5, from - to).toFixed(1)}h-${column.toFixed(1)}z`;
  }).join("");
  return html`<figure class="chart" ref=${box}>
    <div class="legend">
      ${series.map((one) => html`<span class=${one.kind} data-state=${one.kind}><i class="dot"></i>${one.name} <b>${index == null ? "" : unit(one.values[index])}</b></span>`)}
      <span style=${{ marginLeft: "auto" }}>${index == null ? "" : [clockText((start + index * step) * 1000).slice(11, 16), ...marks.filter((mark) => Math.floor((ms(mark.at) / 1000 - start) / step) === index).map((mark) => mark.text)].join(" · ")}</span>
    </div>
    <svg height=${height} role="img" aria-label=${label} onMouseMove=${point} onMouseLeave=${leave} onTouchMove=${(e) => point(e.touches[0])} onTouchEnd=${leave}>
      ${width > 0 && html`
        ${grid.map((v) => html`<line class="rule" x1=${left} x2=${left + w} y1=${y(v)} y2=${y(v)} /><text x=${left - 8} y=${y(v) + 4} text-anchor="end">${unit(v)}</text>`)}
        ${labels.map((s) => html`<text x=${atX(s)} y=${height - 5} text-anchor=${atX(s) > left + w - 16 ? "end" : atX(s) < left + 16 ? "start" : "middle"}>${every >= 86400 ? clockText(s * 1000).slice(5, 10) : clockText(s * 1000).slice(11, 16)}</text>`)}
        ${marks.map((mark) => { const s = ms(mark.at) / 1000; return s >= start && s <= start + n * step && html`<line class="mark" x1=${atX(s)} x2=${atX(s)} y1=${above} y2=${above + hgt}><title>${mark.text}</title></line>`; })}
        ${columns.map((one) => html`<g class=${one.kind} data-state=${one.kind}><path class="column" d=${bars(one.values)} /></g>`)}
        ${series.filter((one) => !one.columns).map((one) => html`<g class=${one.kind} data-state=${one.kind}><path class="line" d=${line(one.values)} /><path class="line lone" d=${dots(one.values)} /></g>`)}
        ${index != null && html`<line class="cursor" x1=${x(index)} x2=${x(index)} y1=${above} y2=${above + hgt} />`}`}
    </svg>
    <table class="hidden"><caption>${label}, last value</caption><tbody>${series.map((one) => html`<tr><th scope="row">${one.name}</th><td>${unit(one.values[one.values.length - 1])}</td></tr>`)}</tbody></table>
  </figure>`;
}

export const RANGES = [["15m", "15 min"], ["1h", "1 h"], ["6h", "6 h"], ["24h", "24 h"], ["7d", "7 d"], ["30d", "30 d"]];
/** Tabs of which one is chosen. */
export const Tabs = ({ label, options, value, onChoose }) => html`<div class="tabs" role="group" aria-label=${label}>${options.map(([key, text, n]) => html`<button aria-pressed=${String(key === value)} onClick=${() => onChoose(key)}>${text}${n !== undefined && html`<span class="n">${n == null ? "" : num(n)}</span>`}</button>`)}</div>`;

/** Return the history of *range*; that of the last hour of everything comes with the stream, where the server sends it. */
export function useHistory(range, { queue, task } = {}) {
  useSignal(changed);
  const [waited, setWaited] = useState(false);
  useEffect(() => { const timer = setTimeout(() => setWaited(true), 1500); return () => clearTimeout(timer); }, []);
  const streamed = range === "1h" && !queue && !task;
  const asked = useQuery(streamed && (live.history || !waited) ? null : `history${query({ range, queue, task })}`, { every: 10000 });
  return streamed && live.history ? { data: live.history, error: null } : asked;
}

/** Throughput and latency of everything, one queue or one task. */
export function History({ queue, task }) {
  const [range, setRange] = useParam("range", "1h", RANGES);
  const { data, error } = useHistory(range, { queue, task });
  const n = { "15m": 15, "1h": 60, "6h": 360, "24h": 1440, "7d": 168, "30d": 720 }[range];
  const step = data?.step ?? (n > 200 ? 3600 : 60);
  const shared = { start: data?.times?.[0] ?? live.now() / 1000 - n * step, step };
  // More points than pixels: neighbours are put together, counts by their sum, percentiles by the largest.
  const group = Math.ceil((data?.times?.length ?? 0) / 360) || 1;
  const fewer = (values, sum = true) => (group === 1 ? values : Array.from({ length: Math.ceil(values.length / group) }, (_, i) => {
    const part = values.slice(i * group, (i + 1) * group).filter((v) => v != null);
    return part.length ? part.reduce((a, b) => (sum ? a + b : Math.max(a, b))) : null;
  }));
  const counts = (name) => fewer(data?.[name] ?? []);
  const times = (name) => fewer(data?.[name] ?? [], false);
  return html`<${Problem} error=${error} /><section class="stack" aria-label="History"><${Tabs} label="Period" options=${RANGES} value=${range} onChoose=${setRange} /><div class="grid2">
    <${Card} title=${`Jobs that ended ${step >= 3600 ? group > 1 ? `in ${group} h` : "an hour" : group > 1 ? `in ${group} minutes` : "a minute"}`}>
      <${Chart} start=${shared.start} step=${step * group} marks=${data?.marks} label="Jobs that ended, by outcome" series=${["done", "retried", "failed"].map((name) => ({ name, kind: name, columns: true, values: counts(name) }))} />
    <//>
    <${Card} title="Duration of runs">
      <${Chart} start=${shared.start} step=${step * group} marks=${data?.marks} unit=${span} label="Duration of runs, percentiles" series=${["p50", "p95", "p99"].map((p) => ({ name: p, kind: p, values: times(`${p}_ms`) }))} />
    <//>
  </div>${data?.read_queues < data?.queues_total && html`<p class="muted">The first ${num(data.read_queues)} of ${num(data.queues_total)} queues by name. The page of a queue has its own history.</p>`}</section>`;
}

// ---- toasts, clipboard, confirmation --------------------------------------------------------------------------------

const toasts = { ...signal(), list: [] };
/** Say *text* in a corner for some seconds. An error stays until it is closed. */
export function toast(text, { error = false } = {}) {
  const one = { text: String(text), error, id: Math.random() };
  toasts.list = [...toasts.list.filter((other) => other.text !== one.text).slice(-3), one];
  toasts.emit();
  if (!error) setTimeout(() => closeToast(one), 5000);
}
function closeToast(one) {
  toasts.list = toasts.list.filter((other) => other !== one);
  toasts.emit();
}
function Toasts() {
  useSignal(toasts);
  return html`<div class="toasts" role="status" aria-live="polite">${toasts.list.map((one) => html`<div key=${one.id} class=${`toast${one.error ? " error" : ""}`}><span>${one.text}</span><button onClick=${() => closeToast(one)}>Close</button></div>`)}</div>`;
}

/** Put *text* on the clipboard, also on a page without TLS. */
export async function copy(text) {
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    toast("Copied.");
  } catch {
    toast("The browser does not allow to copy.", { error: true });
  }
}

/** Do *work*, an async function, and say its error. Returns whether it went well. */
export async function attempt(work, said) {
  try {
    const answer = await work();
    const text = typeof said === "function" ? said(answer) : said;
    if (text) toast(text);
    return true;
  } catch (error) {
    toast(error.code ? `${error.code} ${error.message}` : error.message, { error: true });
    return false;
  }
}

/** Return whether something goes on, and what begins it: not a second time before it has ended. */
function useOnce() {
  const [busy, setBusy] = useState(false);
  const now = useRef(false); // a second click comes before the first is drawn
  return [busy, async (work) => {
    if (now.current) return;
    now.current = true;
    setBusy(true);
    try { await work(); } finally { now.current = false; setBusy(false); }
  }];
}

/** A form in a dialog: its fields are the children. It is sent once, stays with its error, and closes after *onSend*, an async function, went well. */
export function Form({ title, word, onSend, onClose, children }) {
  const [busy, once] = useOnce();
  const [error, setError] = useState(null);
  const send = (event) => {
    event.preventDefault();
    once(async () => {
      try { await onSend(); onClose(); } catch (problem) { setError(problem); }
    });
  };
  return html`<${Dialog} label=${title} onClose=${onClose}><form class="stack" onSubmit=${send}><h2>${title}</h2>${children}<${Problem} error=${error} />
    <div class="ends"><button type="button" onClick=${onClose}>Back</button><button class="primary" type="submit" disabled=${busy}>${word}</button></div></form><//>`;
}

/** A button of an action; where the person may not do it, it is disabled and says so. */
export function Act({ action, run, said, again, children, kind = "", disabled = false, title }) {
  const [busy, once] = useOnce();
  const allowed = may(action);
  const click = () => once(async () => { await attempt(run, said); again?.(); }); // one that failed may have met what changed meanwhile
  return html`<button class=${kind} disabled=${!allowed || disabled || busy} title=${allowed ? title : "Your role does not allow this."} onClick=${click}>${children}</button>`;
}

const asked = { ...signal(), one: null };
/** Ask for confirmation; returns whether it was given. *say*: what happens, with its count. The key Enter does no *danger*. */
export const confirm = (title, say, word, { danger = true } = {}) => new Promise((answer) => {
  asked.one = { title, say, word, danger, answer };
  asked.emit();
});
/** A modal dialog: open for as long as it is drawn. */
export function Dialog({ label, onClose, children, kind = "" }) {
  const box = useRef(null);
  useEffect(() => {
    box.current.showModal();
    box.current.querySelector("[data-focus]")?.focus();
    return () => box.current?.close();
  }, []);
  return html`<dialog ref=${box} class=${kind} aria-label=${label} onCancel=${(e) => { e.preventDefault(); onClose(); }} onClick=${(e) => e.target === box.current && onClose()}>${children}</dialog>`;
}
function Confirmation() {
  useSignal(asked);
  const one = asked.one;
  if (!one) return null;
  const close = (value) => { asked.one = null; asked.emit(); one.answer(value); };
  return html`<${Dialog} label=${one.title} onClose=${() => close(false)}><div class="stack"><h2>${one.title}</h2><p class="muted">${one.say}</p>
    <div class="ends"><button data-focus=${one.danger ? "" : null} onClick=${() => close(false)}>Back</button><button class=${`primary${one.danger ? " danger" : ""}`} data-focus=${one.danger ? null : ""} onClick=${() => close(true)}>${one.word}</button></div></div><//>`;
}

// ---- overview -------------------------------------------------------------------------------------------------------

/** Return the address of a link that the server gives: `{page, name | id | filter}`. */
export const linkHref = (link) => ({ queue: () => queueHref(link.name), job: () => jobHref(link.id), jobs: () => jobsHref(link.filter), schedule: () => href("schedules", { name: link.name }), limit: () => href("limits"), group: () => href("limits"), worker: () => href("workers", { id: link.id ?? link.name }) })[link.page]?.() ?? href(link.page ?? "");
const LEVELS = { problem: "dead", warning: "warning" };

/** What asks for attention, each with links to where it is mended. */
export function Flags({ list }) {
  const links = (flag) => html`<span class="links">${(flag.links ?? []).map((link) => html`<a href=${linkHref(link)}>${link.page === "jobs" ? "its jobs" : link.page === "job" ? "the job" : link.name ?? link.page}</a>`)}</span>`;
  const many = (flag) => flag.links?.length > 2; // they stand below the text, and else at its end
  return html`<section class="card notices" aria-label="Needs attention">${list.length
    ? list.map((flag) => html`<div class="notice" data-state=${LEVELS[flag.level] ?? "warning"}><${Icon} name="failures" /><span>${flag.text}${flag.remedy && html`<span class="remedy">${flag.remedy.split("  (")[0]}</span>`}${many(flag) && links(flag)}</span>${!many(flag) && links(flag)}</div>`)
    : html`<div class="notice muted" data-state="done"><${Icon} name="check" /><span>Nothing needs attention.</span></div>`}</section>`;
}

const TILES = [["ready", "Ready"], ["leased", "Running"], ["scheduled", "Scheduled"], ["waiting", "Waiting"], ["dead", "Dead"]];
const FIRST = `from conveyor import Conveyor

app = Conveyor()

@app.task
def greet(name: str) -> str:
    return f"Hello {name}"

greet.enqueue("Ada")`;

/** Pause all queues, or resume all, after a question that tells how many. */
const ofAll = async (paused, count) => {
  const said = paused ? "workers take nothing more from them. What runs goes on." : "also those that were paused one by one.";
  const word = paused ? "Pause" : "Resume";
  if (!(await confirm(`${word} all queues?`, `${queuesOf(count)} ${paused ? "paused" : "resumed"}: ${said}`, `${word} ${num(count)}`, { danger: paused }))) return;
  const { queues } = await api.post(`queues/${paused ? "pause" : "resume"}`, { all: true });
  toast(`${queuesOf(queues.length)} ${paused ? "paused" : "resumed"}.`);
};
const queuesOf = (n) => `${num(n)} ${n === 1 ? "queue is" : "queues are"}`;

function Overview() {
  const data = useLive();
  const [later, setLater] = useState(false);
  useEffect(() => { const timer = setTimeout(() => setLater(true), 1500); return () => clearTimeout(timer); }, []);
  const checks = useQuery(later ? "overview" : null, { every: 30000 });
  const { data: hour } = useHistory("1h");
  if (!data) return html`<${Head} title="Overview" /><div class="loading" role="status">Loading …</div>`;
  const { totals = {}, queues = [], flags = [] } = data;
  const findings = (checks.data?.findings ?? []).filter((one) => one.code !== "E12" && (one.name !== "queue" || ["E10", "E34"].includes(one.code))).map((one) => ({ ...one, links: [{ page: "redis" }] }));
  const failing = (hour?.tasks ?? []).filter((task) => task.failed || task.retried).sort((a, b) => b.failed - a.failed || b.retried - a.retried).slice(0, 6);
  const largest = [...queues].sort((a, b) => b.ready + b.leased + b.dead - (a.ready + a.leased + a.dead)).slice(0, 6);
  const oldest = queues.reduce((a, b) => ((b.oldest_age ?? -1) > (a?.oldest_age ?? -1) ? b : a), null);
  const minute = data.minute;
  return html`
    <${Head} title="Overview">${totals.paused_queues > 0 && html`<${Act} action="pause_queues" run=${() => ofAll(false, totals.paused_queues)}><${Icon} name="play" size=${13} />Resume all<//>`}${data.queues_total > (totals.paused_queues ?? 0) && html`<${Act} action="pause_queues" run=${() => ofAll(true, data.queues_total - totals.paused_queues)}><${Icon} name="pause" size=${13} />Pause all<//>`}<//>
    ${queues.length === 0 ? html`<${Card} label="First steps"><${Empty} title="No queue yet" code=${FIRST}>A queue appears with its first job. Enqueue one, and start a worker with <code>conveyor worker</code>.<//><//>` : html`
    <div class="tiles">
      ${TILES.map(([state, text]) => html`<a class=${`tile${state === "dead" && totals.dead ? " bad" : ""}`} href=${state === "dead" ? href("failures") : jobsHref(`state:${state}`)}><span class="label"><i class="dot" data-state=${state}></i>${text}</span><div class="value">${num(totals[state] ?? 0)}</div></a>`)}
      <a class="tile" href=${oldest?.oldest_age != null ? queueHref(oldest.name) : href("queues")}><span class="label">Oldest ready</span><div class="value">${totals.oldest_age == null ? "–" : span(totals.oldest_age * 1000)}</div></a>
      <a class="tile" href=${href("queues")}><span class="label">Done a minute</span><div class="value">${minute ? num(minute.done) : "–"}</div></a>
      <a class=${`tile${!totals.workers && totals.ready ? " bad" : ""}`} href=${href("workers")}><span class="label">Workers</span><div class="value">${num(totals.workers ?? 0)}</div><${Slots} of=${totals.slots} /></a>
    </div>
    ${since(data.counted_since) && html`<p class="muted">Jobs of ${num(data.queues_total)} queues${since(data.counted_since)}.</p>`}
    <${Flags} list=${[...flags, ...findings]} />
    <${History} />
    <div class="grid2">
      <${Card} title="Failing tasks, last hour" body=${false} side=${html`<a href=${href("failures")}>All failures</a>`}>${failing.length ? html`<${Table} label="Failing tasks" rows=${failing} keyOf=${(t) => t.task} columns=${[
        { name: "task", title: "Task", cell: (t) => html`<a class="name" href=${jobsHref(`state:dead ${term("task", t.task)}`)}>${t.task}</a>` },
        { name: "share", title: "Failed", num: true, cell: (t) => percent(t.failed, t.failed + t.done) },
        { name: "retried", title: "Retried", num: true, cell: (t) => html`<${Count} n=${t.retried} state="retried" />` },
        { name: "dead", title: "Dead", num: true, cell: (t) => html`<${Count} n=${t.failed} state="dead" />` },
      ]} />` : html`<${Empty} title=${hour?.read_queues < hour?.queues_total ? "No failed attempt in the queues that were read" : "No failed attempt"}>Tasks whose attempts failed in the last hour stand here.<//>`}<//>
      <${Card} title="Largest queues" body=${false} side=${html`<a href=${href("queues")}>All ${num(data.queues_total ?? queues.length)} queues</a>`}><${Table} label="Largest queues" rows=${largest} keyOf=${(q) => q.name} columns=${[
        { name: "queue", title: "Queue", cell: (q) => html`<a class="name" href=${queueHref(q.name)}>${q.name}</a>${q.paused ? html` <span class="tag warning">paused</span>` : ""}` },
        { name: "ready", title: "Ready", num: true, cell: (q) => html`<${Count} n=${q.ready} />` },
        { name: "leased", title: "Running", num: true, cell: (q) => html`<${Count} n=${q.leased} state="leased" />` },
        { name: "dead", title: "Dead", num: true, cell: (q) => html`<${Count} n=${q.dead} state="dead" />` },
        { name: "oldest", title: "Oldest", kind: "mid", num: true, tall: true, cell: (q) => (q.oldest_age == null ? html`<span class="zero">–</span>` : span(q.oldest_age * 1000)) },
      ]} /><//>
    </div>`}`;
}

// ---- shell ----------------------------------------------------------------------------------------------------------

/** The pages: path, name, key, and the module that draws it. */
export const PAGES = [
  ["", "Overview", "o", "home", null],
  ["queues", "Queues", "q", "queues", "queues"],
  ["jobs", "Jobs", "j", "jobs", "jobs"],
  ["failures", "Failures", "f", "failures", "failures"],
  ["schedules", "Schedules", "s", "schedules", "schedules"],
  ["workers", "Workers", "w", "workers", "workers"],
  ["limits", "Limits and groups", "l", "limits", "limits"],
  ["topics", "Topics", "t", "topics", "system"],
  ["redis", "Redis", "r", "redis", "system"],
  ["audit", "Audit", "a", "audit", "system"],
];
const loaded = {};
const load = (name) => (loaded[name] ??= import(`./views/${name}.js`).catch((error) => { delete loaded[name]; throw error; }));

/** Draw the page of the present address; its module is loaded first. */
function Page({ route }) {
  const [view, setView] = useState({ key: "", component: Overview });
  const name = route.page;
  const file = { job: "job", queue: "queues" }[name] ?? PAGES.find(([path]) => path === name)?.[4];
  useEffect(() => {
    if (route.page === "") { setView({ key: "", component: Overview }); return; }
    if (!file) { setView({ key: name, component: NotFound }); return; }
    let wanted = true;
    load(file).then(
      (module) => wanted && setView({ key: name, component: module.pages[name] }),
      () => wanted && setView({ key: name, component: () => html`<${Head} title="Not loaded" /><${Problem} error=${{ message: "This page could not be loaded from the server. Reload to try again." }} />` }),
    );
    return () => { wanted = false; };
  }, [name]);
  if (view.key !== name) return html`<div class="loading" role="status">Loading …</div>`;
  return html`<${view.component} key=${`${name}/${route.arg}`} route=${route} />`;
}
const NotFound = () => html`<${Head} title="No such page" /><${Card}><${Empty} title="There is nothing at this address"><a href=${href("")}>Back to the overview</a><//><//>`;

function Nav({ route, data }) {
  const totals = data?.totals ?? {};
  const counts = { queues: data?.queues_total ?? data?.queues?.length, failures: totals.dead, workers: totals.workers };
  const place = { job: "jobs", queue: "queues" }[route.page] ?? route.page;
  return html`<nav class="nav" aria-label="Pages">${PAGES.map(([path, text, , icon], i) => html`
    ${(i === 1 || i === 4 || i === 8) && html`<div class="gap"></div>`}
    <a href=${href(path)} aria-current=${place === path ? "page" : null}><${Icon} name=${icon} />${text}${counts[path] > 0 && html`<span class=${`count ${path === "failures" ? "dead" : ""}`}>${num(counts[path])}</span>`}</a>`)}</nav>`;
}

/** The search in the head of each page: a filter, or an id. */
function Search() {
  const [text, setText] = useState("");
  const send = (event) => {
    event.preventDefault();
    const value = text.trim();
    if (!value) return;
    setText("");
    event.target.querySelector("input").blur();
    go(/^[\w./-]+:[0-9A-Za-z_-]{8,}$/.test(value) && !/^(state|task|queue|tag|error|args|age|attempt|worker|meta)[.:]/.test(value) ? jobHref(value) : jobsHref(value));
  };
  return html`<form class="searchbox search" role="search" onSubmit=${send}><${Icon} name="search" /><input id="search" type="search" placeholder="Find jobs: an id, state:dead task:mail.* …" aria-label="Find jobs" autocomplete="off" spellcheck=${false} value=${text} onInput=${(e) => setText(e.target.value)} /><kbd aria-hidden="true">/</kbd></form>`;
}

const overlay = { ...signal(), name: null, module: null };
/** Open the palette or the help; their module is loaded at the first use. */
async function open(name) {
  overlay.module ??= await import("./parts/palette.js").catch(() => null);
  overlay.name = overlay.module ? name : null;
  overlay.emit();
}
function Overlay() {
  useSignal(overlay);
  const close = () => { overlay.name = null; overlay.emit(); };
  if (!overlay.name) return null;
  return html`<${overlay.module[overlay.name]} onClose=${close} />`;
}

document.addEventListener("keydown", (event) => {
  if ((event.metaKey || event.ctrlKey) && event.key.toLowerCase() === "k") {
    event.preventDefault();
    open("Palette");
    return;
  }
  if (!settings.keys || event.metaKey || event.ctrlKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.closest?.("input, textarea, select, [contenteditable]")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.key === "/") {
    event.preventDefault();
    (document.getElementById("filter") ?? document.getElementById("search"))?.focus();
  } else if (event.key === "?") open("Help");
  else {
    const page = PAGES.find(([, , key]) => key === event.key.toLowerCase());
    if (page) go(href(page[0]));
  }
});

const THEMES = { auto: "light", light: "dark", dark: "auto" };
/** Change to the next theme: as the system, light, dark. */
export const nextTheme = () => setSetting("theme", THEMES[settings.theme] ?? "auto");

function Shell() {
  useSignal(moved);
  useSignal(settingsChanged);
  const data = useLive();
  const session = live.session ?? {};
  const [menu, setMenu] = useState(false);
  const route = currentRoute();
  const main = useRef(null);
  const place = `${route.page}/${route.arg}`;
  const before = useRef(place);
  useEffect(() => {
    if (before.current === place) return;
    before.current = place;
    setMenu(false);
    window.scrollTo(0, 0);
    main.current?.focus({ preventScroll: true });
  }, [place]);
  const says = { live: settings.every > 1 ? `every ${settings.every} s` : "live", lost: "no answer", paused: "paused", connecting: "connecting" }[live.state];
  return html`
    <a class="skip" href="#main" onClick=${(e) => { e.preventDefault(); main.current.focus(); }}>Skip to the content</a>
    <div class="shell">
      <header class=${`side${menu ? " open" : ""}`}>
        <a class="brand" href=${href("")}><svg width="22" height="22" viewBox="0 0 16 16" aria-hidden="true"><rect width="16" height="16" rx="4" fill="var(--accent)" /><path d="M3 5h7M3 8h10M3 11h5" stroke="var(--on-accent)" stroke-width="1.6" stroke-linecap="round" /></svg>Conveyor ${session.namespace && session.namespace !== "conveyor" && html`<small>${session.namespace}</small>`}</a>
        <${Nav} route=${route} data=${data} />
        <div class="about">
          <div class="row"><span class=${`live ${live.state}`} role="status">${says}</span>
            <select aria-label="Refresh" value=${String(settings.every)} onChange=${(e) => setSetting("every", Number(e.target.value))}>${[[1, "1 s"], [5, "5 s"], [30, "30 s"], [0, "paused"]].map(([n, text]) => html`<option value=${String(n)} selected=${settings.every === n}>${text}</option>`)}</select></div>
          <div class="row"><label for="times">Times</label><select id="times" value=${settings.times} onChange=${(e) => setSetting("times", e.target.value)}>${[["ago", "relative"], ["local", "local"], ["utc", "UTC"]].map(([key, text]) => html`<option value=${key} selected=${settings.times === key}>${text}</option>`)}</select></div>
          <div class="row"><button class="plain small" onClick=${nextTheme} aria-label=${`Theme: ${settings.theme}. Change it.`}><${Icon} name="theme" size=${14} />${settings.theme}</button><button class="plain small" onClick=${() => open("Help")}>Keys <kbd>?</kbd></button></div>
          <div class="clip">${[session.version, session.user, session.read_only && "read only"].filter(Boolean).join(" · ")}</div>
        </div>
      </header>
      <main class="main" id="main" ref=${main} tabindex="-1" onClick=${() => menu && setMenu(false)}>
        <div class="top"><button class="icon menu" aria-label="Menu" aria-expanded=${String(menu)} onClick=${(e) => { e.stopPropagation(); setMenu(!menu); }}><${Icon} name="menu" /></button>${route.page === "jobs" ? html`<span class="search"></span>` : html`<${Search} />`}<button class="plain tall" onClick=${() => open("Palette")}>Go to … <kbd>${/Mac|iP/.test(navigator.platform) ? "⌘K" : "Ctrl K"}</kbd></button></div>
        ${live.state === "lost" && html`<div class="problem" role="alert" style=${{ marginBottom: "16px" }}>${data ? `${live.message || "The dashboard's server does not answer."} The numbers are those of the last answer; it is tried again.` : live.message || "The dashboard's server does not answer yet. It is tried again."}</div>`}
        <div class="page"><${Page} route=${route} /></div>
      </main>
    </div>
    <${Toasts} /><${Confirmation} /><${Overlay} />`;
}

// The server writes what the page shows first behind the page itself; the stream brings it too.
const first = JSON.parse(document.getElementById("first")?.textContent ?? "{}");
Object.assign(live, { session: first.session ?? null, history: first.history ?? null });
if (first.snapshot) live.take(first.snapshot);
render(html`<${Shell} />`, document.getElementById("app"));
// What the stream brings is drawn anew, so it waits until the first view is painted.
if (first.snapshot) requestAnimationFrame(() => setTimeout(live.restart));
else live.restart();
