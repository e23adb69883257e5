// One job: why it waits or how it ended, its path and attempts, its error, arguments, logs and everything else that is known.
import { Act, Answer, Card, Elapsed, Empty, Form, Head, Icon, Meter, State, Tabs, Time, api, confirm, copy, go, href, html, jobHref, jobsHref, linkHref, live, may, ms, num, percent, queueHref, shown, span, term, toast, useEffect, useLive, useQuery, useRef, useState, Flags } from "../app.js";
import { StateDiagram, Timeline } from "../parts/graph.js";
import { Causes } from "./queues.js";
import { JsonText, Traceback, checked, pretty } from "../parts/text.js";

const BUTTONS = [
  ["retry", "Retry", "retry_jobs", "primary"], ["promote", "Run now", "retry_jobs", ""], ["cancel", "Cancel", "cancel_jobs", ""],
  ["rerun", "Run again", "enqueue_jobs", ""], ["delete", "Delete", "delete_jobs", "danger"],
];
const SAID = { retried: "The job is ready again.", promoted: "The job is ready now.", cancelled: "The job is cancelled.", asked: "The worker was asked to stop the job.", deleted: "The job is deleted." };
const FOLLOW_MS = 5000;
const WAITING = ["position", "scheduled", "running", "ended", "rerun", "parent"];

async function act(name, id) {
  if (name === "rerun" && !(await confirm("Run the job again?", "A new job with the same arguments is enqueued, and does all of its work once more.", "Run it again"))) return;
  if (name === "delete" && !(await confirm("Delete the job?", "It is deleted with its arguments and errors. This cannot be undone.", "Delete it"))) return;
  const { results: [one] } = name === "rerun" ? await api.post("jobs/rerun", { ids: [id] }) : await api.post("jobs/actions", { action: name, ids: [id] });
  if (one.outcome === "not found") throw new Error("The job is not there any more. Nothing was changed.");
  if (one.outcome === "refused") throw new Error(one.detail || "The job was not changed.");
  const made = name === "rerun" && (one.id !== id ? one.id : /^\S+$/.test(one.detail ?? "") && one.detail);
  if (made) { toast("A new job with the same arguments is enqueued."); go(jobHref(made)); return; }
  toast(SAID[one.outcome] ?? one.detail ?? one.outcome);
  if (name === "delete") go(href("jobs"));
}

/** A dialog that changes a job that waits: its time, priority or arguments. */
function Update({ job, onClose, again }) {
  const [delay, setDelay] = useState("");
  const [priority, setPriority] = useState(String(job.priority));
  const whole = job.payload && job.task && !job.payload.endsWith("…");
  const [args, setArgs] = useState(whole ? pretty(job.payload) : "");
  const send = async () => {
    const parts = [];
    if (delay.trim()) parts.push(`"delay": ${JSON.stringify(delay.trim())}`);
    if (Number(priority) !== job.priority) parts.push(`"priority": ${Number(priority)}`);
    if (whole && args !== pretty(job.payload)) {
      parts.push(`"args": ${checked(args)}`);
    }
    if (!parts.length) return;
    const found = await api.post("jobs/update", `{"id": ${JSON.stringify(job.id)}, "changes": {${parts.join(", ")}}}`);
    if (!found.changed) throw new Error(found.detail);
    toast("The job is changed.");
    again();
  };
  return html`<${Form} title="Change the job" word="Change it" onSend=${send} onClose=${onClose}>
    <label class="field"><span>Start in (10m, 2h, 1d; empty: as it is)</span><input value=${delay} onInput=${(e) => setDelay(e.target.value)} /></label>
    <label class="field"><span>Priority, 0 to 9, higher first</span><input type="number" min="0" max="9" value=${priority} onInput=${(e) => setPriority(e.target.value)} /></label>
    ${whole && html`<label class="field"><span>Arguments, JSON${job.payload.includes("[redacted]") ? ". What is [redacted] stays as it is" : ""}</span><textarea spellcheck=${false} value=${args} onInput=${(e) => setArgs(e.target.value)}></textarea></label>`}<//>`;
}

/** A dialog that enqueues the same task with arguments that can be edited. */
function Duplicate({ job, onClose }) {
  const [args, setArgs] = useState(pretty(job.payload));
  const send = async () => {
    const { id } = await api.post("enqueue", `{"task": ${JSON.stringify(job.task)}, "queue": ${JSON.stringify(job.queue)}, "kwargs": ${checked(args)}}`);
    toast("A new job is enqueued.");
    go(jobHref(id));
  };
  return html`<${Form} title=${`Enqueue a copy of ${job.task}`} word="Enqueue" onSend=${send} onClose=${onClose}>
    <label class="field"><span>Arguments, JSON</span><textarea data-focus="" spellcheck=${false} value=${args} onInput=${(e) => setArgs(e.target.value)}></textarea></label><//>`;
}

function Logs({ lines }) {
  const box = useRef(null);
  const last = useRef(true); // whoever reads an earlier line keeps it in sight
  useEffect(() => { if (last.current) box.current.scrollTop = box.current.scrollHeight; }, [lines.at(-1)?.at, lines.length]);
  return html`<div class="log" ref=${box} onScroll=${({ target }) => { last.current = target.scrollHeight - target.scrollTop - target.clientHeight < 24; }} tabindex="0" role="log" aria-label="Log lines">${lines.map((line) => html`<div class=${String(line.level).toLowerCase()}><time datetime=${line.at}>${new Date(ms(line.at)).toISOString().slice(11, 23)}</time>${line.level !== "INFO" ? `${line.level} ` : ""}${shown(line.text)}</div>`)}</div>`;
}

function Facts({ job, doc }) {
  const facts = [
    ["Queue", html`<a href=${queueHref(job.queue)}>${job.queue}</a>`],
    job.task && ["Task", html`<a href=${jobsHref(term("task", job.task))}>${job.task}</a>`],
    ["Enqueued", html`<${Time} at=${job.enqueued} />`],
    job.due && ["Due", html`<${Time} at=${job.due} />`],
    job.leased_at && ["Running", html`for <${Elapsed} since=${job.leased_at} />`],
    job.ended && ["Ended", html`<${Time} at=${job.ended} />`],
    job.ran_ms != null && ["Ran", span(job.ran_ms)],
    job.expires && ["Expires", html`<${Time} at=${job.expires} />`],
    (job.attempt || !["done", "cancelled"].includes(job.state)) && ["Attempts", `${num(job.attempt)}${job.failures ? `, ${num(job.failures)} failed` : ""}${job.crashes ? `, ${num(job.crashes)} crashed` : ""}`],
    ["Priority", num(job.priority)],
    job.worker && ["Worker", job.host && job.pid ? `${job.host}:${job.pid}` : job.worker],
    job.timeout_ms && ["Timeout", span(job.timeout_ms)],
    job.group && ["Group", html`<a href=${href("limits")}>${job.group}</a>`],
    job.unique && ["Unique key", html`<span class="mono">${job.unique}</span>`],
    job.limits?.length > 0 && ["Limits", html`<a href=${href("limits")}>${job.limits.join(", ")}</a>`],
    job.tags?.length > 0 && ["Tags", job.tags.map((tag) => html`<a class="tag" href=${jobsHref(term("tag", tag))}>${tag}</a> `)],
    job.reason && ["Reason", job.reason],
    ...Object.entries(job.headers ?? {}).map(([name, value]) => [name, html`<span class="mono">${shown(value)}</span>`]),
  ].filter(Boolean);
  return html`<${Card} title="Facts"><dl class="facts">${facts.map(([name, value]) => html`<dt>${name}</dt><dd>${value}</dd>`)}</dl>${(doc.copy?.python || doc.copy?.command) && html`<div class="row" style=${{ marginTop: "16px" }}>${doc.copy.python && html`<button class="small" onClick=${() => copy(doc.copy.python)}>Copy as Python</button>`}${doc.copy.command && html`<button class="small" onClick=${() => copy(doc.copy.command)}>Copy as command</button>`}</div>`}<//>`;
}

function Attempts({ doc }) {
  const [at, setAt] = useState(null);
  const all = doc.job.errors ?? [];
  // A job that was given up as poison has its last crash twice: as it was, and in what is said of all of them.
  const errors = all.filter((error, i) => !(all[i + 1]?.type === "crashed" && all[i + 1].attempt === error.attempt));
  const one = errors[at ?? errors.length - 1];
  return html`${doc.attempts?.length > 0 && html`<${Card} title="Attempts"><${Timeline} attempts=${doc.attempts} /><//>`}
    ${one && html`<${Card} title=${errors.length > 1 ? "Errors" : "Error"} side=${errors.length > 1 && html`<${Tabs} label="Attempt" options=${errors.slice(-8).map((error) => [errors.indexOf(error), String(error.attempt)])} value=${at ?? errors.length - 1} onChoose=${setAt} />`}>
      <div class="stack"><p class="small muted">Attempt ${num(one.attempt)}, <${Time} at=${one.at} />${one.worker ? html` on ${one.worker}` : ""}. <a href=${jobsHref(`state:dead ${term("error", one.type)}${doc.job.task ? ` ${term("task", doc.job.task)}` : ""}`)}>Jobs that failed alike</a></p><${Traceback} error=${one} /></div><//>`}`;
}

function Job({ route }) {
  const id = route.arg;
  const answer = useQuery(`job?id=${encodeURIComponent(id)}`, { every: 900 });
  const [dialog, setDialog] = useState("");
  const flags = (useLive()?.flags ?? []).filter((flag) => flag.links?.some((link) => link.page === "job" && link.id === id));
  const gone = answer.error?.status === 404;
  const job = gone ? null : answer.data?.job;
  const can = gone ? [] : answer.data?.actions ?? [];
  const running = job?.state === "leased";
  useEffect(() => { // its worker sends the lines of a job that is looked at as they come
    if (!running || !may("view_payloads")) return undefined;
    const follow = () => document.hidden || live.state !== "live" || api.get(`job/logs?id=${encodeURIComponent(id)}`).catch(() => {});
    follow();
    const timer = setInterval(follow, FOLLOW_MS);
    return () => clearInterval(timer);
  }, [running]);
  const title = job ? job.task || (job.task === "" ? "Message" : "Job") : "Job";
  return html`<${Head} title=${title} crumb=${html`<a href=${href("jobs")}>Jobs</a>${job && html` / <a href=${queueHref(job.queue)}>${job.queue}</a>`}`} sub=${job && html`<span class="row"><${State} value=${job.state} /><span class="id"><span class="mono">${shown(job.id)}</span><button class="plain icon small" aria-label="Copy the id" onClick=${() => copy(job.id)}><${Icon} name="copy" size=${13} /></button></span></span>`}>
      ${BUTTONS.filter(([name]) => can.includes(name)).map(([name, word, permission, kind]) => html`<${Act} action=${permission} kind=${kind} again=${answer.again} run=${() => act(name, id)}>${word}<//>`)}
      ${can.includes("update") && html`<button disabled=${!may("edit_jobs")} onClick=${() => setDialog("update")}>Change …</button>`}
      ${job?.task && job.payload && !job.payload.endsWith("…") && html`<button disabled=${!may("enqueue_jobs")} onClick=${() => setDialog("duplicate")}>Duplicate …</button>`}<//>
    ${gone ? html`<${Card}><${Empty} title="No such job">${answer.error.message}<//><//>` : html`<${Answer} of=${answer}>${(doc) => html`
      ${flags.length > 0 && html`<${Flags} list=${flags} />`}
      ${doc.why && html`<section class="card" aria-label="Why"><div class="why" data-state=${WAITING.includes(doc.why.kind) ? (doc.why.kind === "ended" ? job.state : "leased") : "warning"}><span class="clamp">${doc.why.sentence}</span>${(doc.why.links ?? []).length > 0 && html`<div class="small">${doc.why.links.map((link) => html`<a href=${linkHref(link)}>${link.name ?? link.id ?? link.page}</a> `)}</div>`}</div>${doc.why.also?.length > 0 && html`<div class="notices"><${Causes} list=${doc.why.also} /></div>`}</section>`}
      ${doc.progress && html`<${Card} title="Progress" side=${html`<span class="muted">${doc.progress.total ? percent(doc.progress.done, doc.progress.total) : ""}</span>`}><div class="stack"><${Meter} used=${doc.progress.done} most=${doc.progress.total} /><span class="small muted">${num(doc.progress.done)}${doc.progress.total ? ` of ${num(doc.progress.total)}` : ""}${doc.progress.text ? ` · ${shown(doc.progress.text)}` : ""}</span></div><//>`}
      <div class="grid-main"><div class="page">
        <${Card} title="Path"><div class="scroll" tabindex="0" role="group" aria-label="Path"><${StateDiagram} path=${doc.path ?? [job.state]} /></div><//>
        <${Attempts} doc=${doc} />
        <${Card} title=${job.task === "" ? "Body" : "Arguments"}>${job.payload != null ? html`<${JsonText} label="Arguments" text=${job.payload} size=${job.payload_size} whole=${`conveyor job show ${job.id} --json`} />` : html`<p class="muted">${job.hidden ? "Hidden from your role." : "Not kept."}</p>`}<//>
        ${job.result != null && html`<${Card} title="Result"><${JsonText} label="Result" text=${job.result} size=${job.result_size} whole=${`conveyor job show ${job.id} --json`} /><//>`}
        ${doc.logs?.length > 0 && html`<${Card} title="Log"><${Logs} lines=${doc.logs} /><//>`}
      </div><div class="page">
        <${Facts} job=${job} doc=${doc} />
        ${doc.notes && Object.keys(doc.notes).length > 0 && html`<${Card} title="Notes"><dl class="facts">${Object.entries(doc.notes).map(([name, value]) => html`<dt>${name}</dt><dd class="mono">${shown(typeof value === "string" ? value : JSON.stringify(value))}</dd>`)}</dl><//>`}
        ${doc.history?.length > 0 && html`<${Card} title="History"><dl class="facts">${[...doc.history].reverse().map((entry) => html`<dt><${Time} at=${entry.at} /></dt><dd><span class="clamp" title=${entry.reason || null}>${entry.reason?.startsWith(`${entry.state}:`) ? "" : entry.state + (entry.reason ? ": " : "")}${shown(entry.reason)}</span>${entry.by ? html` <span class="muted">by ${entry.by}</span>` : ""}${entry.worker ? html` <span class="muted">${entry.worker}</span>` : ""}</dd>`)}</dl><//>`}
      </div></div>
      ${dialog === "update" && html`<${Update} job=${job} again=${answer.again} onClose=${() => setDialog("")} />`}
      ${dialog === "duplicate" && html`<${Duplicate} job=${job} onClose=${() => setDialog("")} />`}`}<//>`}`;
}

export const pages = { job: Job };
