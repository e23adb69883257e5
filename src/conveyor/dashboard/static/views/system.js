// Topics, the Redis server, and the audit of what people did.
import { Act, Answer, Card, Count, Empty, Head, Icon, Meter, Table, Time, api, attempt, bytes, confirm, html, jobsHref, num, queueHref, span, useQuery, useState } from "../app.js";

function Topics() {
  const answer = useQuery("topics");
  const drop = async (topic, queue) => {
    if (!(await confirm("Unsubscribe the queue?", `${queue} gets no further copies of ${topic}. Those that it has stay.`, "Unsubscribe"))) return;
    await api.post("topics/unsubscribe", { topic, queues: [queue] });
  };
  return html`<${Head} title="Topics" sub="What is published is copied to each subscribed queue." />
    <${Answer} of=${answer}>${(data) => html`<${Card} body=${false} label="Topics">${data.topics.length ? html`<${Table} label="Topics" rows=${data.topics} keyOf=${(t) => t.name} columns=${[
      { name: "name", title: "Topic", sort: (t) => t.name, cell: (t) => html`<span class="name">${t.name || "(all others)"}</span>${t.subscribers.length === 0 && html` <span class="tag warning">nobody is subscribed</span>`}` },
      { name: "subscribers", title: "Queues", cell: (t) => html`<span class="row">${t.subscribers.map((queue) => html`<span class="tag"><a class="quiet" href=${queueHref(queue)}>${queue}</a><${Act} action="manage_schedules" kind="cross" title=${`Unsubscribe ${queue}`} again=${answer.again} run=${() => drop(t.name, queue)}><span aria-hidden="true">×</span><span class="hidden">Unsubscribe ${queue}</span><//></span>`)}</span>` },
      { name: "nobody", title: "Reached nobody", num: true, tall: true, sort: (t) => t.nobody, cell: (t) => html`<${Count} n=${t.nobody} state="warning" />` },
      { name: "published", title: "Published", num: true, sort: (t) => t.published, cell: (t) => html`<${Count} n=${t.published} />` },
    ]} />` : html`<${Empty} title="No topics yet" code=${"app.topic(\"user.created\").subscribe(\"emails\", \"audit\")\napp.topic(\"user.created\").publish({\"id\": 7})"}>A topic copies each message to all queues that are subscribed to it.<//>`}<//>`}<//>`;
}

const LEVELS = { ok: ["done", "check"], note: ["cancelled", "more"], warning: ["warning", "failures"], problem: ["dead", "failures"] };
const yesNo = (value) => (value == null ? "–" : value === true ? "on" : value === false ? "off" : String(value));

function Redis() {
  const answer = useQuery("redis", { every: 4000 });
  return html`<${Head} title="Redis" sub=${answer.data?.url} />
    <${Answer} of=${answer}>${(data) => {
      const memory = data.memory ?? {}, kept = data.persistence ?? {};
      const facts = [
        ["Server", `${data.family ?? ""} ${data.version ?? ""}`], ["Kind", data.mode], ["Up for", data.uptime == null ? "–" : span(data.uptime * 1000)], ["Clients", num(data.clients)], ["Replicas", num(data.replicas)],
        ["Memory policy", memory.policy], ["Peak memory", bytes(memory.peak)], ["Fragmentation", memory.fragmentation == null ? "–" : String(memory.fragmentation)],
        ["Append-only file", yesNo(kept.aof)], ["fsync", yesNo(kept.fsync)], ["Last snapshot", html`<${Time} at=${typeof kept.rdb_last === "number" ? kept.rdb_last * (kept.rdb_last < 1e11 ? 1000 : 1) : kept.rdb_last} />`], ["Durability", data.durability],
        ["Evicted keys", num(data.evicted)], ["Expired keys", num(data.expired)],
      ].filter(([, value]) => value != null && value !== "");
      return html`<div class="tiles few">
        <div class="tile"><span class="label">Memory</span><div class="value">${bytes(memory.used)}</div><div class="note">${memory.max ? html`of ${bytes(memory.max)}<${Meter} used=${memory.used} most=${memory.max} state=${memory.used > memory.max * 0.8 ? "warning" : "leased"} />` : "no limit"}</div></div>
        <div class="tile"><span class="label">Commands a second</span><div class="value">${num(data.ops_per_second)}</div></div>
        <div class="tile"><span class="label">Round trip</span><div class="value">${data.latency_ms == null ? "–" : `${data.latency_ms.toFixed(2)} ms`}</div></div>
        <div class="tile"><span class="label">Keys</span><div class="value">${num(data.keys)}</div></div>
        <div class=${`tile${data.evicted ? " bad" : ""}`}><span class="label">Evicted</span><div class="value">${num(data.evicted ?? 0)}</div></div>
      </div>
      <div class="grid2"><${Card} title="Checks" body=${false}><div class="notices">${(data.findings ?? []).map((one) => html`<div class="notice" data-state=${LEVELS[one.level]?.[0] ?? "warning"}><${Icon} name=${LEVELS[one.level]?.[1] ?? "failures"} /><span>${one.text}${one.remedy && html`<span class="remedy">${one.remedy}</span>`}</span></div>`)}</div><//>
      <${Card} title="Server"><dl class="facts">${facts.map(([name, value]) => html`<dt>${name}</dt><dd>${value}</dd>`)}</dl><//></div>`;
    }}<//>`;
}

function Audit() {
  const answer = useQuery("audit?limit=100", { every: 5000 });
  const [more, setMore] = useState({ entries: [], next: undefined });
  const next = more.next === undefined ? answer.data?.next : more.next;
  const fetchMore = () => attempt(async () => {
    const page = await api.get(`audit?limit=100&before=${encodeURIComponent(next)}`);
    setMore({ entries: [...more.entries, ...page.entries], next: page.next ?? null });
  });
  return html`<${Head} title="Audit" sub="What people did here and on the command line, the newest first." />
    <${Answer} of=${answer}>${(data) => html`<${Card} body=${false} label="Audit">${data.entries.length ? html`<${Table} label="Audit" rows=${[...data.entries, ...more.entries]} keyOf=${(e) => e.id} columns=${[
      { name: "at", title: "When", cell: (e) => html`<${Time} at=${e.at} />` },
      { name: "who", title: "Who", cell: (e) => e.who || html`<span class="muted">unknown</span>` },
      { name: "what", title: "What", cell: (e) => html`<span class="clamp">${e.what}${e.target ? html` <strong>${e.target}</strong>` : ""}</span>` },
      { name: "filter", title: "Of", tall: true, cell: (e) => html`<span class="clamp">${e.filter && html`<a class="mono" href=${jobsHref(e.filter)}>${e.filter}</a>`} <span class="muted">${e.detail}</span></span>` },
      { name: "count", title: "Count", num: true, cell: (e) => html`<${Count} n=${e.count} />` },
    ]} />` : html`<${Empty} title="Nobody has changed anything yet">Each action stands here with who did it, to what, and when.<//>`}
    ${next && html`<div class="foot"><button class="small" onClick=${fetchMore}>Show more</button></div>`}<//>`}<//>`;
}

export const pages = { topics: Topics, redis: Redis, audit: Audit };
