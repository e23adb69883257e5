// Tables of limits and of groups, with what an operator may change.
import { Act, Count, Form, Meter, Table, Time, api, html, may, num, queueHref, useState } from "../app.js";

/** A form in a dialog that asks for one value. */
export function Ask({ title, label, value, hint, word, onSend, onClose }) {
  const [text, setText] = useState(value);
  return html`<${Form} title=${title} word=${word} onSend=${() => onSend(text.trim())} onClose=${onClose}>
    <label class="field"><span>${label}</span><input data-focus="" value=${text} onInput=${(e) => setText(e.target.value)} /></label><p class="small muted">${hint}</p><//>`;
}

/** Limits: how much of each is used, who waits, and whether an operator's number holds. */
export function LimitTable({ rows, again, queues = false }) {
  const [edited, setEdited] = useState(null);
  const target = (limit) => ({ queue: limit.queue, name: limit.name, key: limit.key ?? undefined });
  return html`<${Table} label="Limits" rows=${rows} keyOf=${(l) => `${l.queue}/${l.name}/${l.key ?? ""}`} columns=${[
    { name: "name", title: "Limit", sort: (l) => l.name, cell: (l) => html`<span class="name">${l.name}</span>${l.key != null ? html` <span class="tag">${l.key}</span>` : ""}${l.overridden && html` <span class="tag warning">changed, code says ${l.declared}</span>`}` },
    { name: "queue", title: "Queue", kind: "short", tall: true, hide: !queues, sort: (l) => l.queue, cell: (l) => html`<a title=${l.queue} href=${queueHref(l.queue)}>${l.queue}</a>` },
    { name: "limit", title: "Allows", num: true, tall: true, cell: (l) => l.limit },
    { name: "used", title: "Used", num: true, sort: (l) => l.used / (l.most || 1), cell: (l) => html`${num(l.used)}<span class="muted"> of ${num(l.most)}</span>` },
    { name: "meter", title: "", kind: "mid", tall: true, cell: (l) => html`<${Meter} used=${l.used} most=${l.most} state=${l.used >= l.most ? "warning" : "leased"} label=${`${l.used} of ${l.most} used`} />` },
    { name: "waiting", title: "Waiting", num: true, sort: (l) => l.waiting, cell: (l) => html`<${Count} n=${l.waiting} state="waiting" />` },
    { name: "opens", title: "Opens", tall: true, cell: (l) => html`<${Time} at=${l.opens_at} empty="" />` },
    { name: "actions", kind: "actions", cell: (l) => html`<button class="small" disabled=${!may("manage_limits")} onClick=${() => setEdited(l)}>Set</button> ${l.overridden && html`<${Act} action="manage_limits" kind="small" again=${again} run=${() => api.post("limits/reset", target(l))} said=${`${l.name} is what code says again.`}>Reset<//>`}` },
  ]} />
  ${edited && html`<${Ask} title=${`Set ${edited.name}`} label="Limit" value=${edited.limit} word="Set" hint="500/1m is a rate, 50 a concurrency. It wins over the code's until it is reset. Running workers follow at once."
    onClose=${() => setEdited(null)} onSend=${async (limit) => { await api.post("limits/set", { ...target(edited), limit }); again(); }} />`}`;
}

/** Groups: how many wait and run, their weight, and whether they are paused. */
export function GroupTable({ rows, again, queues = false }) {
  const [edited, setEdited] = useState(null);
  return html`<${Table} label="Groups" rows=${rows} keyOf=${(g) => `${g.queue}/${g.key}`} columns=${[
    { name: "key", title: "Group", sort: (g) => g.key, cell: (g) => html`<span class="name">${g.key}</span>${g.paused && html` <span class="tag warning">paused</span>`}` },
    { name: "queue", title: "Queue", kind: "short", hide: !queues, tall: true, cell: (g) => html`<a title=${g.queue} href=${queueHref(g.queue)}>${g.queue}</a>` },
    { name: "waiting", title: "Waiting", num: true, sort: (g) => g.waiting, cell: (g) => html`<${Count} n=${g.waiting} />` },
    { name: "running", title: "Running", num: true, sort: (g) => g.running, cell: (g) => html`<${Count} n=${g.running} state="leased" />` },
    { name: "weight", title: "Weight", num: true, tall: true, cell: (g) => num(g.weight) },
    { name: "actions", kind: "actions", cell: (g) => html`<button class="small tall" disabled=${!may("manage_limits")} onClick=${() => setEdited(g)}>Weight</button> <${Act} action="manage_limits" kind="small" again=${again} run=${() => api.post("groups/set", { queue: g.queue, key: g.key, paused: !g.paused })} said=${`Group ${g.key} is ${g.paused ? "resumed" : "paused"}.`}>${g.paused ? "Resume" : "Pause"}<//>` },
  ]} />
  ${edited && html`<${Ask} title=${`Weight of ${edited.key}`} label="Weight" value=${String(edited.weight)} word="Set" hint="A group of weight 3 gets three turns where one of weight 1 gets one."
    onClose=${() => setEdited(null)} onSend=${async (weight) => { await api.post("groups/set", { queue: edited.queue, key: edited.key, weight: Number(weight) }); again(); }} />`}`;
}
