// The list of queues, and one queue.
import { Act, Answer, Card, Count, Empty, Flags, Head, History, Icon, Meter, Slots, Spark, Table, api, confirm, go, href, html, jobs, jobsHref, linkHref, num, queueHref, rate, since, span, term, toast, useLive, useParam, useQuery } from "../app.js";
import { GroupTable, LimitTable } from "../parts/limits.js";
import { WorkerTable } from "../parts/workers.js";

const recent = (queue) => queue.recent?.done ?? [];
const age = (q) => (q.oldest_age == null ? html`<span class="zero">–</span>` : span(q.oldest_age * 1000));

/** What is unusual about a queue, in a word each. */
export const Marks = ({ q }) => html`${q.paused && html` <span class="tag warning">paused</span>`}${q.stranded && !q.paused && html` <span class="tag dead">no worker</span>`}${q.unplaced > 0 && html` <span class="tag dead">${num(q.unplaced)} unplaced</span>`}${q.unanswered?.length > 0 && html` <span class="tag dead">no answer</span>`}${q.blocked > 0 && html` <span class="tag warning">${num(q.blocked)} producers wait</span>`}${q.flow?.sentence && html` <span class="small muted">${q.flow.sentence}</span>`}`;

const pauseOrResume = (q, again, kind = "") => (q.paused
  ? html`<${Act} action="pause_queues" kind=${kind} again=${again} run=${() => api.post("queues/resume", { queue: q.name })} said=${`${q.name} is resumed.`}><${Icon} name="play" size=${13} />Resume<//>`
  : html`<${Act} action="pause_queues" kind=${kind} again=${again} run=${() => api.post("queues/pause", { queue: q.name })} said=${`${q.name} is paused: workers take nothing more from it.`}><${Icon} name="pause" size=${13} />Pause<//>`);

const COLUMNS = (again) => [
  { name: "name", title: "Queue", sort: (q) => q.name, cell: (q) => html`<a class="name" href=${queueHref(q.name)}>${q.name}</a><${Marks} q=${q} />` },
  { name: "ready", title: "Ready", num: true, sort: (q) => q.ready, cell: (q) => html`<${Count} n=${q.ready} />` },
  { name: "leased", title: "Running", num: true, sort: (q) => q.leased, cell: (q) => html`<${Count} n=${q.leased} state="leased" />` },
  { name: "scheduled", title: "Scheduled", num: true, tall: true, sort: (q) => q.scheduled, cell: (q) => html`<${Count} n=${q.scheduled} />` },
  { name: "waiting", title: "Waiting", num: true, tall: true, sort: (q) => q.waiting, cell: (q) => html`<${Count} n=${q.waiting} />` },
  { name: "dead", title: "Dead", num: true, sort: (q) => q.dead, cell: (q) => html`<${Count} n=${q.dead} state="dead" />` },
  { name: "oldest", title: "Oldest", num: true, tall: true, sort: (q) => q.oldest_age, cell: age },
  { name: "in", title: "In/s", num: true, tall: true, sort: (q) => q.flow?.in_per_second, cell: (q) => rate(q.flow?.in_per_second) },
  { name: "out", title: "Out/s", num: true, tall: true, sort: (q) => q.flow?.out_per_second, cell: (q) => rate(q.flow?.out_per_second) },
  { name: "spark", title: "5 min", kind: "mid", tall: true, cell: (q) => html`<${Spark} values=${recent(q)} width=${72} label=${`Done in the last minutes: ${recent(q).join(", ")}`} state="done" />` },
  { name: "workers", title: "Workers", kind: "mid", num: true, tall: true, sort: (q) => q.workers, cell: (q) => html`<${Count} n=${q.workers} />${q.slots?.total > 0 && html`<${Meter} used=${q.slots.used} most=${q.slots.total} label=${`${q.slots.used} of ${q.slots.total} slots used`} />`}` },
  { name: "actions", kind: "actions tall", cell: (q) => pauseOrResume(q, again, "small") },
];

const ORDERS = [["name", "by name"], ["ready", "most ready"], ["dead", "most dead"], ["oldest_age", "oldest job"]];

function Queues() {
  const [text, setText] = useParam("q", "");
  const [order, setOrder] = useParam("sort", "name", ORDERS);
  const answer = useQuery(`queues?limit=100&sort=${order}${text ? `&q=${encodeURIComponent(text)}` : ""}`);
  const many = answer.data?.total > 100;
  return html`<${Head} title="Queues">${many && html`<select aria-label="Order" value=${order} onChange=${(e) => setOrder(e.target.value)}>${ORDERS.map(([value, said]) => html`<option value=${value}>${said}</option>`)}</select>`}<input type="search" aria-label="Names that contain" placeholder="Filter by name" value=${text} onInput=${(e) => setText(e.target.value)} /><//>
    <${Answer} of=${answer}>${(data) => html`<${Card} body=${false} label="Queues">${data.queues.length
      ? html`<${Table} label="Queues" rows=${data.queues} keyOf=${(q) => q.name} columns=${COLUMNS(answer.again)} />`
      : text ? html`<${Empty} title="No queue has such a name" />`
        : html`<${Empty} title="No queue yet" code=${"app.queue(\"mail\").push({\"to\": \"ada@example.com\"})\n# or\nconveyor push mail '{\"to\": \"ada@example.com\"}'"}>A queue appears with its first message or job.<//>`}
      ${data.total > data.queues.length && html`<div class="foot">The first ${num(data.queues.length)} of ${num(data.total)} queues, ${ORDERS.find(([value]) => value === order)[1]}${order !== "name" && since(data.at)}. Filter by name to see others.</div>`}<//>`}<//>`;
}

/** Causes of waiting, one sentence each, with links to where they are mended. */
export const Causes = ({ list }) => list.map((cause) => html`<div class="notice" data-state=${["position", "running", "ended", "scheduled"].includes(cause.kind) ? "leased" : "warning"}><${Icon} name="schedules" /><span>${cause.sentence}</span><span class="links">${(cause.links ?? []).map((link) => html`<a href=${linkHref(link)}>${link.name ?? link.id ?? link.page}</a>`)}</span></div>`);

function Queue({ route }) {
  const name = route.arg;
  const answer = useQuery(`queue?name=${encodeURIComponent(name)}`);
  const live = useLive();
  const flags = (live?.flags ?? []).filter((flag) => flag.links?.some((link) => link.page === "queue" && link.name === name));
  const q = answer.data?.queue;
  const act = { again: answer.again };
  const purge = async (dead) => {
    const n = dead ? q.dead : q.ready + q.scheduled + q.waiting;
    if (!(await confirm(dead ? "Delete all dead jobs?" : "Purge the queue?", `${jobs(n, "are deleted")} with all arguments: ${dead ? "the dead ones" : "those that do not run"} of ${name}. This cannot be undone.`, `Delete ${num(n)}`))) return null;
    const { removed } = await api.post("queues/purge", { queue: name, dead });
    return toast(`${jobs(removed, "are deleted")}.`);
  };
  const redrive = async () => {
    if (!(await confirm("Retry all dead jobs?", `${jobs(q.dead, "become ready again")}: the dead ones of ${name}, the oldest first.`, `Retry ${num(q.dead)}`, { danger: false }))) return null;
    const { moved } = await api.post("queues/redrive", { queue: name });
    return toast(`${jobs(moved, "are ready again")}.`);
  };
  const remove = async () => {
    if (!(await confirm("Delete the queue?", `${name} and what is kept about it are deleted. It has to be empty and without workers.`, "Delete the queue"))) return;
    await api.post("queues/delete", { queue: name });
    go(href("queues"));
  };
  return html`<${Head} title=${name} crumb=${html`<a href=${href("queues")}>Queues</a>`} sub=${q && html`<${Marks} q=${q} />${q.partitions > 1 ? ` ${q.partitions} partitions` : ""}${q.max_length ? ` at most ${jobs(q.max_length)}` : ""}`}>
      ${q && html`${pauseOrResume(q, answer.again)}
        <${Act} ...${act} action="retry_jobs" disabled=${!q.dead} run=${redrive}>Retry dead<//>
        ${q.unplaced > 0 && html`<${Act} ...${act} action="retry_jobs" run=${() => api.post("queues/repair", { queue: name })} said=${(a) => `${jobs(a.repaired, "are back in place")}.`}>Repair<//>`}
        <${Act} ...${act} action="purge_queues" kind="danger" disabled=${!q.dead} run=${() => purge(true)}>Delete dead<//>
        <${Act} ...${act} action="purge_queues" kind="danger" disabled=${!(q.ready + q.scheduled + q.waiting)} run=${() => purge(false)}>Purge<//>
        <${Act} ...${act} action="purge_queues" kind="danger" disabled=${q.ready + q.scheduled + q.waiting + q.leased + q.dead > 0} run=${remove}>Delete<//>`}<//>
    ${answer.error?.status === 404 ? html`<${Card}><${Empty} title="No such queue">${answer.error.message} <a href=${href("queues")}>All queues</a><//><//>` : html`<${Answer} of=${answer}>${(data) => html`
      <div class="tiles few">
        ${[["ready", "Ready"], ["leased", "Running"], ["scheduled", "Scheduled"], ["waiting", "Waiting"], ["dead", "Dead"]].map(([state, text]) => html`<a class=${`tile${state === "dead" && q.dead ? " bad" : ""}`} href=${jobsHref(`${term("queue", name)} state:${state}`)}><span class="label"><i class="dot" data-state=${state}></i>${text}</span><div class="value">${num(q[state])}</div></a>`)}
        <div class="tile"><span class="label">Oldest ready</span><div class="value">${age(q)}</div></div>
        <div class="tile"><span class="label">In/s · Out/s</span><div class="value">${rate(q.flow?.in_per_second)} · ${rate(q.flow?.out_per_second)}</div></div>
        <div class="tile"><span class="label">Workers</span><div class="value">${num(q.workers)}</div><${Slots} of=${data.slots} /></div>
      </div>
      ${q.max_length && html`<${Card} label="Room"><div class="row between small muted"><span>${num(q.ready + q.scheduled + q.waiting + q.leased)} of ${num(q.max_length)} places used</span></div><${Meter} used=${q.ready + q.scheduled + q.waiting + q.leased} most=${q.max_length} /><//>`}
      ${flags.length > 0 && html`<${Flags} list=${flags} />`}
      ${(data.causes.length > 0 || data.paused_tasks?.length > 0) && html`<${Card} title="Why jobs wait" body=${false}><div class="notices"><${Causes} list=${data.causes} />${(data.paused_tasks ?? []).map((task) => html`<div class="notice" data-state="warning"><${Icon} name="pause" /><span>The task ${task} is paused.</span><span class="links"><${Act} ...${act} action="pause_queues" kind="small" run=${() => api.post("queues/resume", { queue: name, task })} said=${`${task} is resumed.`}>Resume<//></span></div>`)}</div><//>`}
      <${History} queue=${name} />
      ${data.partitions.length > 1 && html`<${Card} title="Partitions" body=${false}><${Table} label="Partitions" rows=${data.partitions} keyOf=${(p) => p.name} columns=${COLUMNS().filter((c) => !["actions", "in", "out", "spark"].includes(c.name)).map((c) => (c.name === "name" ? { ...c, title: "Partition", cell: (p) => html`<span class="name">${p.name}</span><${Marks} q=${p} />` } : c))} /><//>`}
      <${Card} title="Workers" body=${false}>${data.workers.length ? html`<${WorkerTable} rows=${data.workers} again=${answer.again} />` : html`<${Empty} title="No worker serves this queue" code=${`conveyor worker -q ${name}`}>Jobs stay safe in the queue until one starts.<//>`}<//>
      ${data.limits.length > 0 && html`<${Card} title="Limits" body=${false}><${LimitTable} rows=${data.limits} again=${answer.again} /><//>`}
      ${data.groups.length > 0 && html`<${Card} title="Groups" body=${false}><${GroupTable} rows=${data.groups} again=${answer.again} /><//>`}
    `}<//>`}`;
}

export const pages = { queues: Queues, queue: Queue };
