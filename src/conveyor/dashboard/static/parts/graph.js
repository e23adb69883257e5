// Pictures of one job: its way through the states, and its attempts over time. Plain SVG and boxes.
import { Elapsed, Time, html, live, ms, num, span, stateWord, useLayoutEffect, useRef } from "../app.js";

const PLACES = { scheduled: [76, 34], waiting: [76, 146], ready: [226, 90], leased: [376, 90], done: [536, 34], dead: [536, 90], cancelled: [536, 146] };
const USUAL = [["scheduled", "ready"], ["waiting", "ready"], ["ready", "leased"], ["leased", "done"], ["leased", "dead"], ["leased", "cancelled"], ["leased", "scheduled"]];
const W = 96, H = 32;

/** Return the curve of an edge, and where its number stands. */
function curve(from, to) {
  const [ax, ay] = PLACES[from], [bx, by] = PLACES[to];
  if (from === "leased" && to === "scheduled") return [`M${ax} ${ay - H / 2} C${ax} 4 ${ax - 60} ${by - 12} ${bx + W / 2 + 8} ${by - 6}`, [246, 20]];
  if (ax < bx) {
    const x1 = ax + W / 2, x2 = bx - W / 2 - 8, far = bx - ax > 200;
    const mid = (x1 + x2) / 2, lift = far && ay === by ? 60 : 0;
    return [`M${x1} ${ay} C${mid} ${ay + lift} ${mid} ${by + lift} ${x2} ${by}`, [mid + (ay === by ? 0 : 18), (ay + by) / 2 - 5 + lift * 0.75]];
  }
  const down = 172;
  if (to === "waiting") return [`M${ax} ${ay + H / 2} C${ax} ${down} ${bx + 124} ${by + 6} ${bx + W / 2 + 8} ${by + 6}`, [(ax + bx) / 2, down - 6]];
  if (to === "scheduled") return [`M${ax} ${ay - H / 2} C${ax} ${by - 20} ${bx + 124} ${by - 6} ${bx + W / 2 + 8} ${by - 6}`, [(ax + bx) / 2, by - 14]];
  return [`M${ax} ${ay + H / 2} C${ax} ${down} ${bx} ${down} ${bx} ${by + H / 2 + 8}`, [(ax + bx) / 2, down - 2]];
}
/** Return the head of an arrow that ends a curve. */
function arrow(d) {
  const n = d.match(/-?[\d.]+/g).map(Number);
  const [cx, cy, x, y] = n.slice(-4);
  const angle = (Math.atan2(y - cy, x - cx) * 180) / Math.PI;
  return html`<path class="head" d="M0 -4.5L8 0L0 4.5z" transform=${`translate(${x} ${y}) rotate(${angle})`} />`;
}

/** The states of jobs, with the path that this one took. *path*: the states in their order. */
export function StateDiagram({ path: given }) {
  // A due job is leased at once, so that it is recorded as ready for no moment; on the picture it passes there.
  const path = given.flatMap((state, i) => (state === "leased" && ["scheduled", "waiting"].includes(given[i - 1]) ? ["ready", state] : [state]));
  const taken = new Map();
  path.forEach((state, i) => {
    const before = path[i - 1];
    if (i && before !== state && PLACES[before] && PLACES[state]) taken.set(`${before} ${state}`, (taken.get(`${before} ${state}`) ?? 0) + 1);
  });
  const edges = [...new Set([...USUAL.map((pair) => pair.join(" ")), ...taken.keys()])].sort((a, b) => (taken.get(a) ?? 0) - (taken.get(b) ?? 0));
  const now = path.at(-1);
  const been = new Set(path);
  const picture = useRef(null);
  useLayoutEffect(() => { // where the picture is wider than a phone, the present state is in sight
    const frame = picture.current.parentElement;
    frame.scrollLeft = ((PLACES[now]?.[0] ?? 0) / 612) * picture.current.clientWidth - frame.clientWidth / 2;
  }, [now]);
  return html`<svg class="diagram" ref=${picture} viewBox="0 0 612 184" role="img" aria-label=${`Path: ${path.map(stateWord).join(", ")}`}>
    ${edges.map((key) => {
      const [from, to] = key.split(" ");
      const [d, [x, y]] = curve(from, to);
      const n = taken.get(key);
      return html`<g class=${n ? "taken" : ""} data-state=${to === "scheduled" ? "retry" : to}><path class="edge" d=${d} />${arrow(d)}${n > 1 && html`<text class="times" x=${x} y=${y}>${`× ${n}`}</text>`}</g>`;
    })}
    ${Object.entries(PLACES).map(([state, [x, y]]) => html`<g class=${state === now ? "now" : been.has(state) ? "been" : ""} data-state=${state}><rect x=${x - W / 2} y=${y - H / 2} width=${W} height=${H} rx="6" /><text x=${x} y=${y + 4}>${stateWord(state)}</text></g>`)}
  </svg>`;
}

const WAITS = { queue: ["ready", "in the queue"], limit: ["waiting", "at a limit"], group: ["leased", "in its group"], retry: ["retry", "for the retry"], time: ["scheduled", "for its time"] };
const OUTCOMES = { done: "done", failed: "dead", crashed: "dead", running: "leased", returned: "ready", snoozed: "scheduled", cancelled: "cancelled" };

/** The attempts on one axis of time: what each waited for, and how long it ran. */
export function Timeline({ attempts }) {
  const parts = attempts.map((one) => {
    // Of an attempt whose start is not kept the whole is drawn from the end of the one before: it waited and ran.
    const whole = one.began == null && one.since != null && one.ended != null;
    const began = ms(one.began) ?? (whole ? ms(one.since) : ms(one.ended) != null && one.ran_ms != null ? ms(one.ended) - one.ran_ms : null);
    const ended = ms(one.ended) ?? (one.outcome === "running" ? live.now() : began != null ? began + (one.ran_ms ?? 0) : null);
    const waits = one.waited ?? [];
    const total = waits.reduce((sum, wait) => sum + wait.seconds * 1000, 0);
    return { one, began, ended, waits, whole, from: began == null ? null : began - total };
  });
  const known = parts.filter((part) => part.began != null);
  const first = Math.min(...known.map((part) => part.from)), last = Math.max(...known.map((part) => part.ended ?? part.began));
  const wide = Math.max(1, last - first);
  const place = (from, to) => ({ left: `min(${(100 * (from - first)) / wide}%, calc(100% - 2px))`, width: `${(100 * (to - from)) / wide}%` });
  return html`<div class="timeline">${parts.map(({ one, began, ended, waits, whole, from }) => {
    let at = from;
    return html`<span class="nowrap">Attempt ${num(one.number)}</span>
      <span class="track" role="img" aria-label=${`Attempt ${one.number}: ${one.outcome}`}>${began != null && html`${waits.map((wait) => {
        const start = at;
        at += wait.seconds * 1000;
        return html`<i class="wait" data-state=${WAITS[wait.kind]?.[0] ?? "ready"} style=${place(start, at)} title=${`waited ${span(wait.seconds * 1000)} ${WAITS[wait.kind]?.[1] ?? wait.kind}`}></i>`;
      })}<i class=${whole ? "wait" : ""} data-state=${OUTCOMES[one.outcome] ?? "leased"} style=${place(began, ended ?? began)} title=${`${whole ? "waited and ran" : "ran"} ${span(one.ran_ms ?? ended - began)}`}></i>${whole && html`<i data-state=${OUTCOMES[one.outcome] ?? "leased"} style=${{ ...place(ended, ended), marginLeft: "-3px", width: "3px" }}></i>`}`}</span>
      <span class="small muted nowrap">${waits.filter((wait) => wait.seconds >= 0.001).map((wait) => `${span(wait.seconds * 1000)} ${WAITS[wait.kind]?.[1] ?? wait.kind}, `)}${one.outcome === "running" ? html`runs for <${Elapsed} since=${one.began} />` : one.ran_ms != null ? `ran ${span(one.ran_ms)}` : whole ? `waited and ran ${span(ended - began)}` : html`<${Time} at=${one.ended ?? one.began} />`}</span>`;
  })}</div>`;
}
