// Schedules: when each is due, in its own words, what became of its last instants, and their buttons.
import { Act, Answer, Card, Dialog, Empty, Form, Head, Problem, State, Table, Time, api, clocks, confirm, html, jobHref, jobsHref, may, ms, num, query, queueHref, span, term, toast, useEffect, useParam, useQuery, useState } from "../app.js";
import { checked } from "../parts/text.js";

/** The last instants as boxes, the newest at the right; a skipped one says why. */
const Runs = ({ runs }) => html`<span class="runs" role="img" aria-label=${`Last instants: ${runs.map((run) => run.outcome).join(", ") || "none"}`}>${[...runs].slice(0, 12).reverse().map((run) => html`<i data-state=${run.outcome === "fired" ? "fired" : "warning"} title=${`${clocks(ms(run.instant))}: ${run.outcome}${run.skipped > 1 ? ` (${run.skipped})` : ""}`}></i>`)}</span>`;

/** How long after their instants the last jobs of a schedule were enqueued, in seconds, the newest first. */
const drift = (schedule) => schedule.runs.map((run) => run.drift).filter((one) => one != null);

function One({ schedule, onClose, onEdit }) {
  return html`<${Dialog} label=${schedule.name} onClose=${onClose}><div class="stack"><h2>${schedule.name}</h2><p class="muted">${schedule.when}. When the last run still goes on: ${schedule.overlap}. Instants that were missed: ${schedule.missed}.</p>
    ${schedule.next.length > 0 && html`<h3>Next</h3><ol class="mono small">${schedule.next.map((at, i) => html`<li title=${clocks(ms(at))}>${schedule.next_in_zone[i]}</li>`)}</ol>`}
    <h3>Last</h3>${schedule.runs.length ? html`<div class="scroll" tabindex="0" role="group" aria-label="Last instants"><table><tbody>${schedule.runs.map((run) => html`<tr><td><${Time} at=${run.instant} /></td><td><${State} value=${run.outcome === "fired" ? "fired" : "warning"} text=${run.outcome + (run.skipped > 1 ? ` × ${run.skipped}` : "")} /></td><td class="num muted" title="How long after its instant the job was enqueued">${run.drift != null && `+${span(run.drift * 1000)}`}</td><td>${run.job && html`<a href=${jobHref(run.job)}>job</a>`}</td></tr>`)}</tbody></table></div>` : html`<p class="muted">None yet.</p>`}
    <div class="ends">${schedule.origin !== "code" && html`<button disabled=${!may("manage_schedules")} onClick=${onEdit}>Change …</button>`}<button data-focus="" onClick=${onClose}>Close</button></div></div><//>`;
}

/** The next instants of an expression that is being written, or what is wrong with it; nothing is stored. */
function Preview({ timing }) {
  const [found, setFound] = useState(null);
  const asked = timing.cron || timing.every ? query(timing) : "";
  useEffect(() => {
    if (!asked) { setFound(null); return undefined; }
    let current = true;
    const timer = setTimeout(() => api.get(`schedules/preview${asked}`).then((data) => current && setFound({ data }), (error) => current && setFound({ error })), 200);
    return () => { current = false; clearTimeout(timer); };
  }, [asked]);
  return html`<div aria-live="polite">${found && (found.error || found.data.error) ? html`<${Problem} error=${found.error ?? { message: found.data.error }} />` : found && html`<p class="small">${found.data.when}</p><ol class="mono small" aria-label="Next instants">${found.data.next_in_zone.map((at) => html`<li>${at}</li>`)}</ol>`}</div>`;
}

const skeleton = (task) => (task ? `{${task.required.map((name) => `\n  ${JSON.stringify(name)}: null`).join(",")}${task.required.length ? "\n" : ""}}` : "{}");

/** A dialog that puts a schedule: a new one, or *schedule* with other instants, and with other arguments where they are given. */
function Edit({ schedule, tasks, onClose, again }) {
  const [name, setName] = useState(schedule?.name ?? "");
  const [task, setTask] = useState(schedule?.task ?? tasks[0]?.name ?? "");
  const known = tasks.find((one) => one.name === task);
  const [args, setArgs] = useState(schedule ? "" : skeleton(known));
  const [cron, setCron] = useState(schedule?.cron ?? "");
  const [every, setEvery] = useState(schedule?.every ?? "");
  const [tz, setTz] = useState(schedule?.cron ? schedule.tz : "");
  const [queue, setQueue] = useState("");
  const timing = { cron: cron.trim(), every: every.trim(), tz: tz.trim() };
  const typed = (set) => (e) => set(e.target.value);
  const choose = (e) => { setTask(e.target.value); setArgs(skeleton(tasks.find((one) => one.name === e.target.value))); };
  const send = async () => {
    const parts = Object.entries({ name, ...timing, replace: Boolean(schedule) }).map(([key, value]) => `${JSON.stringify(key)}: ${JSON.stringify(value)}`);
    if (!schedule || args.trim()) parts.push(`"task": ${JSON.stringify(task)}, "queue": ${JSON.stringify(schedule?.queue ?? queue.trim())}, "kwargs": ${checked(args)}`);
    await api.post("schedules/put", `{${parts.join(", ")}}`);
    toast(`${name} is ${schedule ? "changed" : "created"}.`);
    again();
  };
  return html`<${Form} title=${schedule ? `Change ${schedule.name}` : "New schedule"} word=${schedule ? "Change it" : "Create it"} onSend=${send} onClose=${onClose}>
    ${!schedule && html`<label class="field"><span>Name</span><input data-focus="" required value=${name} onInput=${typed(setName)} /></label>
    <label class="field"><span>Task</span><select value=${task} onChange=${choose}>${tasks.map((one) => html`<option value=${one.name}>${one.name}</option>`)}</select></label>`}
    ${(!schedule || known) && html`<label class="field"><span>Arguments, JSON${schedule ? " (empty: as they are)" : ""}${known ? html`: <code>${known.signature}</code>` : ""}</span><textarea spellcheck=${false} rows="3" value=${args} onInput=${typed(setArgs)}></textarea></label>`}
    <label class="field"><span>Cron expression: minute hour day month weekday, or second first</span><input class="mono" spellcheck=${false} placeholder="0 9 * * mon-fri" value=${cron} onInput=${typed(setCron)} /></label>
    <label class="field"><span>Time zone of the expression</span><input placeholder="UTC" value=${tz} onInput=${typed(setTz)} /></label>
    <label class="field"><span>Or every (30s, 15m, 1d)</span><input value=${every} onInput=${typed(setEvery)} /></label>
    ${!schedule && html`<label class="field"><span>Queue</span><input placeholder=${known?.queue ?? ""} value=${queue} onInput=${typed(setQueue)} /></label>`}
    <${Preview} timing=${timing} /><//>`;
}

function Schedules() {
  const tasks = useQuery("tasks", { every: 60_000 });
  const [edited, setEdited] = useState(null);
  const known = tasks.data?.tasks ?? [];
  const answer = useQuery("schedules");
  const [open, setOpen] = useParam("name", "");
  const remove = async (one) => {
    if (!(await confirm("Delete the schedule?", `${one.name} gets no further jobs. Those that it has enqueued stay.`, "Delete it"))) return;
    await api.post("schedules/delete", { name: one.name });
    toast(`${one.name} is deleted.`);
  };
  return html`<${Head} title="Schedules">${known.length > 0 && html`<button class="primary" disabled=${!may("manage_schedules") || !may("enqueue_jobs")} onClick=${() => setEdited({})}>New schedule …</button>`}<//>
    ${edited && html`<${Edit} schedule=${edited.name ? edited : null} tasks=${known} again=${answer.again} onClose=${() => setEdited(null)} />`}
    <${Answer} of=${answer}>${(data) => html`<${Card} body=${false} label="Schedules">${data.schedules.length ? html`<${Table} label="Schedules" rows=${data.schedules} keyOf=${(s) => s.name} columns=${[
      { name: "name", title: "Schedule", kind: "wide", sort: (s) => s.name, cell: (s) => html`<button class="link name" onClick=${() => setOpen(s.name)}>${s.name}</button>${s.paused && html` <span class="tag warning">paused</span>`}${s.late && html` <span class="tag dead">stands still</span>`}${s.origin === "code" && html` <span class="tag" title="A decorator in the code declares it">in code</span>`}<span class="sub">${s.when}</span>` },
      { name: "task", title: "Task", kind: "short", tall: true, sort: (s) => s.task, cell: (s) => html`<a class="quiet" title=${s.task} href=${jobsHref(term("task", s.task))}>${s.task}</a>` },
      { name: "queue", title: "Queue", kind: "short mid", tall: true, cell: (s) => html`<a class="quiet" title=${s.queue} href=${queueHref(s.queue)}>${s.queue}</a>` },
      { name: "next", title: "Next", sort: (s) => s.due, cell: (s) => (s.paused ? html`<span class="muted">–</span>` : html`<${Time} at=${s.due} />`) },
      { name: "runs", title: "Last runs", tall: true, cell: (s) => html`<${Runs} runs=${s.runs} />` },
      { name: "drift", title: "Drift", kind: "mid", num: true, tall: true, sort: (s) => drift(s)[0], cell: (s) => html`<span title=${drift(s).length ? `The last job was enqueued ${span(drift(s)[0] * 1000)} after its instant; of the last ${drift(s).length} the longest ${span(Math.max(...drift(s)) * 1000)}` : ""}>${span(drift(s).length ? drift(s)[0] * 1000 : null)}</span>` },
      { name: "fired", title: "Fired", kind: "mid", num: true, tall: true, sort: (s) => s.fired, cell: (s) => num(s.fired) },
      { name: "skipped", title: "Skipped", kind: "mid", num: true, tall: true, sort: (s) => s.skipped, cell: (s) => num(s.skipped) },
      { name: "actions", kind: "actions", cell: (s) => html`<${Act} action="manage_schedules" kind="small" again=${answer.again} run=${() => api.post("schedules/run", { name: s.name })} said=${`A job of ${s.name} is enqueued.`}>Run now<//> <${Act} action="manage_schedules" kind="small" again=${answer.again} run=${() => api.post(`schedules/${s.paused ? "resume" : "pause"}`, { name: s.name })} said=${`${s.name} is ${s.paused ? "resumed" : "paused"}.`}>${s.paused ? "Resume" : "Pause"}<//>${s.origin !== "code" && html` <${Act} action="manage_schedules" kind="small danger" again=${answer.again} run=${() => remove(s)}>Delete<//>`}` },
    ]} />` : html`<${Empty} title="No schedules yet" code=${"@app.cron(\"0 9 * * mon-fri\", tz=\"Europe/Berlin\")\nasync def report() -> None: ...\n\n# or while programs run\napp.schedules.put(\"report\", report.s(), every=\"30s\")"}>A schedule enqueues a job at each of its instants, once, however many workers run.<//>`}<//>
    ${open && data.schedules.some((s) => s.name === open) && html`<${One} schedule=${data.schedules.find((s) => s.name === open)} onClose=${() => setOpen("")} onEdit=${() => { setEdited(data.schedules.find((s) => s.name === open)); setOpen(""); }} />`}`}<//>`;
}

export const pages = { schedules: Schedules };
