// The palette that goes anywhere, and the help with the keys.
import { Dialog, Icon, PAGES, api, attempt, getSettings, go, href, html, jobHref, jobsHref, live, may, nextTheme, queueHref, setSetting, term, useEffect, useRef, useState } from "../app.js";

function entries(text) {
  const queues = live.data?.queues ?? [];
  const names = live.session?.queues ?? queues.map((q) => q.name);
  const all = [
    ...PAGES.map(([path, name, , icon]) => ({ icon, text: name, note: "page", run: () => go(href(path)) })),
    { icon: "failures", text: "Dead jobs", note: "jobs", run: () => go(jobsHref("state:dead")) },
    { icon: "play", text: "Running jobs", note: "jobs", run: () => go(jobsHref("state:leased")) },
    ...names.map((name) => ({ icon: "queues", text: name, note: "queue", run: () => go(queueHref(name)) })),
    ...(live.session?.tasks ?? []).map((name) => ({ icon: "jobs", text: name, note: "task", run: () => go(jobsHref(term("task", name))) })),
    ...(may("pause_queues") ? queues.map((q) => ({ icon: q.paused ? "play" : "pause", text: `${q.paused ? "Resume" : "Pause"} ${q.name}`, note: "action", run: () => attempt(() => api.post(`queues/${q.paused ? "resume" : "pause"}`, { queue: q.name }), `${q.name} is ${q.paused ? "resumed" : "paused"}.`) })) : []),
    { icon: "theme", text: "Change the theme", note: "setting", run: nextTheme },
  ];
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const rank = ({ text: name }) => { // the name itself, then what begins with it
    const at = name.toLowerCase().indexOf(words[0]);
    return at === 0 ? Number(name.length > words[0].length) : at < 0 ? 3 : 2;
  };
  const found = all.filter((one) => words.every((word) => `${one.text} ${one.note}`.toLowerCase().includes(word)));
  if (words.length) found.sort((a, b) => rank(a) - rank(b));
  found.splice(40);
  if (text.trim()) {
    const value = text.trim();
    if (/:[0-9A-Za-z_-]{8,}$/.test(value)) found.unshift({ icon: "jobs", text: `Open ${value}`, note: "job", run: () => go(jobHref(value)) });
    found.push({ icon: "search", text: `Find jobs: ${value}`, note: "search", run: () => go(jobsHref(value)) });
  }
  return found;
}

export function Palette({ onClose }) {
  const [text, setText] = useState("");
  const [at, setAt] = useState(0);
  const list = entries(text);
  const box = useRef(null);
  useEffect(() => box.current?.querySelector("[aria-selected=true]")?.scrollIntoView({ block: "nearest" }), [at]);
  const take = (one) => { onClose(); one?.run(); };
  const key = (event) => {
    if (event.key === "ArrowDown") { event.preventDefault(); setAt((at + 1) % list.length); }
    else if (event.key === "ArrowUp") { event.preventDefault(); setAt((at + list.length - 1) % list.length); }
    else if (event.key === "Enter") { event.preventDefault(); take(list[at]); }
  };
  return html`<${Dialog} kind="palette" label="Go to" onClose=${onClose}>
    <input data-focus="" role="combobox" aria-label="Go to a page, a queue or a task" aria-expanded="true" aria-controls="palette-list" aria-activedescendant=${list.length ? `palette-${at}` : null} placeholder="Go to a page, a queue, a task …" autocomplete="off" spellcheck=${false} value=${text} onInput=${(e) => { setText(e.target.value); setAt(0); }} onKeyDown=${key} />
    <ul id="palette-list" role="listbox" aria-label="Places" ref=${box}>${list.map((one, i) => html`<li id=${`palette-${i}`} role="option" aria-selected=${String(i === at)} onMouseMove=${() => setAt(i)} onClick=${() => take(one)}><${Icon} name=${one.icon} /><span class="clip">${one.text}</span><span class="muted">${one.note}</span></li>`)}</ul><//>`;
}

export function Help({ onClose }) {
  const [keys, setKeys] = useState(getSettings().keys);
  const rows = [["Ctrl K", "go anywhere"], ["/", "find jobs"], ["?", "this help"], ...PAGES.map(([, name, key]) => [key.toUpperCase(), name])];
  return html`<${Dialog} label="Keys" onClose=${onClose}><div class="stack"><h2>Keys</h2>
    <div class="keys">${rows.map(([key, text]) => html`<kbd>${key}</kbd><span>${text}</span>`)}</div>
    <label><input type="checkbox" checked=${keys} onChange=${(e) => { setKeys(e.target.checked); setSetting("keys", e.target.checked); }} /> Keys of one letter</label>
    <h3>Filter</h3><p class="small muted"><code>state:dead task:mail.* queue:mail error:Timeout tag:vip args.user.id:42 age:>1h attempt:>=3 worker:web-1 "free text"</code>; <code>-task:x</code> leaves out.</p>
    <div class="ends"><button data-focus="" onClick=${onClose}>Close</button></div></div><//>`;
}
