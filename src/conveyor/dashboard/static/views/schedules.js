// Schedules: when each is due, in its own words, what became of its last instants, and their buttons.
import { Act, Answer, Card, Dialog, Empty, Head, State, Table, Time, api, clocks, confirm, html, jobHref, jobsHref, ms, num, queueHref, term, toast, useParam, useQuery } from "../app.js";

/** The last instants as boxes, the newest at the right; a skipped one says why. */
const Runs = ({ runs }) => html`<span class="runs" role="img" aria-label=${`Last instants: ${runs.map((run) => run.outcome).join(", ") || "none"}`}>${[...runs].slice(0, 12).reverse().map((run) => html`<i data-state=${run.outcome === "fired" ? "fired" : "warning"} title=${`${clocks(ms(run.instant))}: ${run.outcome}${run.skipped > 1 ? ` (${run.skipped})` : ""}`}></i>`)}</span>`;

function One({ schedule, onClose }) {
  return html`<${Dialog} label=${schedule.name} onClose=${onClose}><div class="stack"><h2>${schedule.name}</h2><p class="muted">${schedule.when}. When the last run still goes on: ${schedule.overlap}. Instants that were missed: ${schedule.missed}.</p>
    ${schedule.next.length > 0 && html`<h3>Next</h3><ol class="mono small">${schedule.next.map((at, i) => html`<li title=${clocks(ms(at))}>${schedule.next_in_zone[i]}</li>`)}</ol>`}
    <h3>Last</h3>${schedule.runs.length ? html`<div class="scroll" tabindex="0" role="group" aria-label="Last instants"><table><tbody>${schedule.runs.map((run) => html`<tr><td><${Time} at=${run.instant} /></td><td><${State} value=${run.outcome === "fired" ? "fired" : "warning"} text=${run.outcome + (run.skipped > 1 ? ` × ${run.skipped}` : "")} /></td><td>${run.job && html`<a href=${jobHref(run.job)}>job</a>`}</td></tr>`)}</tbody></table></div>` : html`<p class="muted">None yet.</p>`}
    <div class="ends"><button data-focus="" onClick=${onClose}>Close</button></div></div><//>`;
}

function Schedules() {
  const answer = useQuery("schedules");
  const [open, setOpen] = useParam("name", "");
  const remove = async (one) => {
    if (!(await confirm("Delete the schedule?", `${one.name} gets no further jobs. Those that it has enqueued stay.`, "Delete it"))) return;
    await api.post("schedules/delete", { name: one.name });
    toast(`${one.name} is deleted.`);
  };
  return html`<${Head} title="Schedules" />
    <${Answer} of=${answer}>${(data) => html`<${Card} body=${false} label="Schedules">${data.schedules.length ? html`<${Table} label="Schedules" rows=${data.schedules} keyOf=${(s) => s.name} columns=${[
      { name: "name", title: "Schedule", kind: "wide", sort: (s) => s.name, cell: (s) => html`<button class="link name" onClick=${() => setOpen(s.name)}>${s.name}</button>${s.paused && html` <span class="tag warning">paused</span>`}${s.late && html` <span class="tag dead">stands still</span>`}${s.origin === "code" && html` <span class="tag" title="A decorator in the code declares it">in code</span>`}<span class="sub">${s.when}</span>` },
      { name: "task", title: "Task", kind: "short", tall: true, sort: (s) => s.task, cell: (s) => html`<a class="quiet" title=${s.task} href=${jobsHref(term("task", s.task))}>${s.task}</a>` },
      { name: "queue", title: "Queue", kind: "short mid", tall: true, cell: (s) => html`<a class="quiet" title=${s.queue} href=${queueHref(s.queue)}>${s.queue}</a>` },
      { name: "next", title: "Next", sort: (s) => s.due, cell: (s) => (s.paused ? html`<span class="muted">–</span>` : html`<${Time} at=${s.due} />`) },
      { name: "runs", title: "Last runs", tall: true, cell: (s) => html`<${Runs} runs=${s.runs} />` },
      { name: "fired", title: "Fired", kind: "mid", num: true, tall: true, sort: (s) => s.fired, cell: (s) => num(s.fired) },
      { name: "skipped", title: "Skipped", kind: "mid", num: true, tall: true, sort: (s) => s.skipped, cell: (s) => num(s.skipped) },
      { name: "actions", kind: "actions", cell: (s) => html`<${Act} action="manage_schedules" kind="small" again=${answer.again} run=${() => api.post("schedules/run", { name: s.name })} said=${`A job of ${s.name} is enqueued.`}>Run now<//> <${Act} action="manage_schedules" kind="small" again=${answer.again} run=${() => api.post(`schedules/${s.paused ? "resume" : "pause"}`, { name: s.name })} said=${`${s.name} is ${s.paused ? "resumed" : "paused"}.`}>${s.paused ? "Resume" : "Pause"}<//>${s.origin !== "code" && html` <${Act} action="manage_schedules" kind="small danger" again=${answer.again} run=${() => remove(s)}>Delete<//>`}` },
    ]} />` : html`<${Empty} title="No schedules yet" code=${"@app.cron(\"0 9 * * mon-fri\", tz=\"Europe/Berlin\")\nasync def report() -> None: ...\n\n# or while programs run\napp.schedules.put(\"report\", report.s(), every=\"30s\")"}>A schedule enqueues a job at each of its instants, once, however many workers run.<//>`}<//>
    ${open && data.schedules.some((s) => s.name === open) && html`<${One} schedule=${data.schedules.find((s) => s.name === open)} onClose=${() => setOpen("")} />`}`}<//>`;
}

export const pages = { schedules: Schedules };
