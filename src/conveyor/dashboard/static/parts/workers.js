// The table of workers.
import { Act, Answer, Count, Dialog, Elapsed, Empty, Meter, Table, Time, api, bytes, confirm, html, jobHref, jobs, jobsHref, num, query, queueHref, shown, span, term, useParam, useQuery, useState } from "../app.js";

const SLOW_LOOP_MS = 1000;
const USAGE = "Of the process and its job processes, as it told them when they changed; 100 % is one core";
const share = (cpu) => (cpu == null ? "–" : `${num(cpu)} %`);
const details = (about) => [about.version && `conveyor ${about.version}`, about.python && `Python ${about.python}`, about.build && `build ${about.build}`].filter(Boolean).join(" · ");

const heldHref = (w) => jobsHref(`state:leased ${term("worker", w.id)}`);

/** The jobs that a worker holds for longest, since when each; the others are behind a link. */
function HeldJobs({ worker }) {
  const answer = useQuery(`workers/jobs${query({ id: worker.id })}`);
  return html`${worker.memory != null && html`<p class="small muted" title=${USAGE}>${bytes(worker.memory)} of memory, ${share(worker.cpu)} of a core</p>`}<${Answer} of=${answer}>${(data) => {
    const more = data.held - data.jobs.length;
    return html`<ul class="held" aria-label=${`Jobs of ${worker.id}`}>${data.jobs.map((job) => html`<li key=${job.id}><a class="name" href=${jobHref(job.id)}>${job.task || "message"}</a> <span class="muted">${job.queue} · <${Elapsed} since=${job.since} /></span></li>`)}
      ${more > 0 && html`<li><a href=${heldHref(worker)}>and ${num(more)} more</a></li>`}${data.held === 0 && html`<li class="muted">It holds no job now.</li>`}</ul>`;
  }}<//>`;
}

/** Workers: where they run, what they serve, how full they are, and whether they still answer. */
export function WorkerTable({ rows, again }) {
  const [stack, setStack] = useState(null);
  const [open, setOpen] = useParam("worker", "");
  const stop = async (worker) => {
    if (!(await confirm("Stop the worker?", `${worker.host}:${worker.pid} takes no more jobs, lets its ${jobs(worker.held)} finish and ends.`, "Stop it"))) return;
    await api.post("workers/stop", { id: worker.id });
  };
  const dump = async (worker) => {
    const answer = await api.post("workers/stack", { id: worker.id });
    setStack({ title: `Stack of ${worker.host}:${worker.pid}`, text: answer.text ?? answer.stack ?? JSON.stringify(answer, null, 2) });
  };
  return html`<${Table} label="Workers" rows=${rows} keyOf=${(w) => w.id} below=${(w) => open === w.id && html`<${HeldJobs} worker=${w} />`} columns=${[
    { name: "worker", title: "Worker", sort: (w) => w.host, cell: (w) => html`<button class="sort name" aria-expanded=${String(open === w.id)} title="The jobs that it holds for longest" onClick=${() => setOpen(open === w.id ? "" : w.id)}>${w.host}${w.pid ? `:${w.pid}` : ""}</button>${w.silent && html` <span class="tag dead">silent</span>`}${!w.silent && !["running", undefined].includes(w.about?.state) && html` <span class="tag warning">${w.about.state}</span>`}${w.about?.loop_lag_ms >= SLOW_LOOP_MS && html` <span class="tag dead" title="So long its event loop was blocked lately: other jobs and its leases waited">loop blocked ${span(w.about.loop_lag_ms)}</span>`}${(w.about?.labels ?? []).map((label) => html` <span class="tag">${label}</span>`)}<span class="sub clip">${details(w.about ?? {})}</span>` },
    { name: "queues", title: "Queues", kind: "wraps", tall: true, cell: (w) => (w.queues ?? (w.queue ? [w.queue] : [])).map((name, i) => html`${i ? ", " : ""}<a href=${queueHref(name)}>${name}</a>`) },
    { name: "held", title: "Jobs", num: true, sort: (w) => w.held, cell: (w) => html`<a href=${heldHref(w)}><${Count} n=${w.held} state="leased" /></a>${w.about?.concurrency ? html`<span class="muted"> of ${num(w.about.concurrency)}</span>` : ""}` },
    { name: "meter", title: "", kind: "mid", tall: true, cell: (w) => w.slots?.total > 0 && html`<${Meter} used=${w.slots.used} most=${w.slots.total} label=${`${w.slots.used} of ${w.slots.total} slots used`} />` },
    { name: "usage", title: "Memory, CPU", num: true, kind: "mid", tall: true, sort: (w) => w.memory, cell: (w) => html`<span title=${USAGE}>${bytes(w.memory)}</span><span class="sub">${share(w.cpu)}</span>` },
    { name: "started", title: "Started", kind: "mid", tall: true, cell: (w) => html`<${Time} at=${w.about?.started} />` },
    { name: "lease", title: "Lease ends", tall: true, cell: (w) => html`<${Time} at=${w.lease_ends} />` },
    { name: "actions", kind: "actions", cell: (w) => html`<${Act} action="stop_workers" kind="small" disabled=${w.about?.state === "quiet"} again=${again} run=${() => api.post("workers/quiet", { id: w.id })} said=${`${w.host}:${w.pid} takes no more jobs.`}>Quiet<//> <${Act} action="stop_workers" kind="small" run=${() => dump(w)}>Stack<//> <${Act} action="stop_workers" kind="small danger" again=${again} run=${() => stop(w)}>Stop<//>` },
  ]} />
  ${stack && html`<${Dialog} label=${stack.title} onClose=${() => setStack(null)}><div class="stack"><h2>${stack.title}</h2><pre class="text" tabindex="0">${shown(stack.text)}</pre><div class="ends"><button data-focus="" onClick=${() => setStack(null)}>Close</button></div></div><//>`}`;
}

/** What to say where no worker is. */
export const NoWorker = () => html`<${Empty} title="No worker runs" code=${"conveyor worker\n\n# or inside another program\nasync with app.worker():\n    ..."}>A worker takes jobs out of queues and runs them. Start one beside your code.<//>`;
