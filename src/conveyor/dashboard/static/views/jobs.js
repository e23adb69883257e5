// The list of jobs: filter bar, tabs of states, choosing, and actions on what is chosen or on all that match.
import { Answer, Card, Count, Empty, Head, Icon, Meter, State, Table, Time, api, attempt, go, href, html, jobHref, live, num, query, queueHref, shortId, shown, span, stateWord, term, useEffect, useMemo, useQuery, useRef, useState } from "../app.js";
import { ActionBar, Operations } from "../parts/operations.js";

const PAGE = 50, MOST_LOOKED = 10_000;
const TABS = ["ready", "leased", "scheduled", "waiting", "dead", "done"];
const WORDS = {
  "state:": "ready, leased, scheduled, waiting, dead, done",
  "task:": "a name, or mail.*",
  "queue:": "its queue",
  "error:": "a word of the type or message",
  "tag:": "a tag",
  "args.": "args.user.id:42, a value of the arguments",
  "age:": "age:>1h, since it was enqueued",
  "attempt:": "attempt:>=3",
  "worker:": "who runs it, or ran it last",
  "id:": "an id",
};

/** Split a filter at its blanks; quoted text is one word. */
const words = (text) => text.match(/(?:"(?:\\.|[^"\\])*"?|[^\s"]+)+/g) ?? [];
const without = (text, name) => words(text).filter((word) => !word.startsWith(name)).join(" ");
const valueOf = (text, name) => words(text).find((word) => word.startsWith(name))?.slice(name.length).replace(/^"|"$/g, "") ?? "";

/** Return what may stand in place of the last word of *text*: `[word, note]`. */
function completions(text) {
  const last = /\s$/.test(text) || !text ? "" : words(text).at(-1) ?? "";
  const colon = last.indexOf(":");
  const match = (list, prefix) => list.filter((value) => value.toLowerCase().includes(last.slice(colon + 1).toLowerCase())).slice(0, 8).map((value) => [`${term(prefix, value)} `, ""]);
  if (colon < 0) return Object.entries(WORDS).filter(([word]) => word.startsWith(last)).map(([word, note]) => [word, note]);
  if (last.startsWith("state:")) return match(TABS, "state");
  if (last.startsWith("task:")) return match(live.session?.tasks ?? [], "task");
  if (last.startsWith("queue:")) return match(live.session?.queues ?? (live.data?.queues ?? []).map((q) => q.name), "queue");
  return [];
}

function FilterBar({ value, error }) {
  const [text, setText] = useState(value);
  const [open, setOpen] = useState(false);
  const [at, setAt] = useState(-1);
  const input = useRef(null);
  useEffect(() => setText(value), [value]);
  const list = open ? completions(text) : [];
  const take = ([word]) => {
    const head = /\s$/.test(text) ? text : text.slice(0, text.length - (words(text).at(-1)?.length ?? 0));
    setText(head + word);
    setAt(-1);
    input.current.focus();
  };
  const send = (event) => {
    event?.preventDefault();
    setOpen(false);
    go(href("jobs", { filter: text.trim() }));
  };
  const key = (event) => {
    if (event.key === "ArrowDown" && list.length) { event.preventDefault(); setOpen(true); setAt((at + 1) % list.length); }
    else if (event.key === "ArrowUp" && list.length) { event.preventDefault(); setAt((at + list.length) % (list.length + 1) - (at <= 0 ? 1 : 0)); }
    else if (event.key === "Enter" && at >= 0 && list[at]) { event.preventDefault(); take(list[at]); }
    else if (event.key === "Tab" && list.length && open && at >= 0) { event.preventDefault(); take(list[at]); }
    else if (event.key === "Escape") { setOpen(false); setAt(-1); }
  };
  return html`<form class="stack" onSubmit=${send}><div class="searchbox"><${Icon} name="search" />
      <input ref=${input} id="filter" type="search" role="combobox" aria-label="Filter" aria-expanded=${String(list.length > 0)} aria-controls="completions" aria-autocomplete="list" aria-activedescendant=${at >= 0 ? `completion-${at}` : null}
        aria-invalid=${error ? "true" : null} placeholder=${'state:dead task:mail.* error:Timeout age:>1h "free text"'} autocomplete="off" spellcheck=${false} value=${text}
        onInput=${(e) => { setText(e.target.value); setOpen(true); setAt(-1); }} onFocus=${() => setOpen(true)} onBlur=${() => setTimeout(() => setOpen(false), 150)} onKeyDown=${key} />
      ${list.length > 0 && html`<ul class="completions" id="completions" role="listbox" aria-label="Completions">${list.map((one, i) => html`<li id=${`completion-${i}`} role="option" aria-selected=${String(i === at)} onMouseDown=${(e) => { e.preventDefault(); take(one); }}><code>${one[0]}</code><span class="muted">${one[1]}</span></li>`)}</ul>`}
    </div>
    ${error && html`<div class="problem" role="alert">${error.position != null && html`<pre>${`${value}\n${" ".repeat(error.position)}^`}</pre>`}${error.message}</div>`}</form>`;
}

const subline = (job) => (job.error ? html`<span class="sub clip"><b>${shown(job.error.type)}</b>${job.error.message ? `: ${shown(job.error.message)}` : ""}</span>` : job.args ? html`<span class="sub clip mono">${shown(job.args)}</span>` : job.hidden ? html`<span class="sub">arguments are hidden from your role</span>` : "");
const when = (job) => (job.state === "scheduled" ? job.due : job.since ?? job.ended ?? job.enqueued);

/** Return the columns of a list of jobs in *state*; those that can be in no row are left out. */
const columnsOf = (state) => [
  { name: "state", title: "State", kind: "state-of", cell: (job) => html`<${State} value=${job.state} />` },
  { name: "task", title: "Job", kind: "wide", cell: (job) => html`<a class="name" href=${jobHref(job.id)}>${job.task === "" ? "message" : job.task ?? "unknown"}</a>${subline(job)}` },
  { name: "id", title: "Id", tall: true, cell: (job) => html`<a class="quiet muted mono nowrap" href=${jobHref(job.id)} title=${job.id}>${shortId(job.id)}</a>` },
  { name: "queue", title: "Queue", kind: "short", tall: true, cell: (job) => html`<a class="quiet" title=${job.queue} href=${queueHref(job.queue)}>${job.queue}</a>` },
  { name: "tags", title: "Tags", kind: "short mid", tall: true, cell: (job) => (job.tags ?? []).slice(0, 2).map((tag) => html`<a class="tag" href=${href("jobs", { filter: term("tag", tag) })}>${tag}</a> `) },
  { name: "attempt", title: "Attempt", num: true, tall: true, cell: (job) => html`<${Count} n=${job.attempt} />` },
  { name: "progress", title: "Progress", tall: true, hide: ["ready", "scheduled", "waiting", "dead"].includes(state), cell: (job) => (job.progress?.total ? html`<${Meter} used=${job.progress.done} most=${job.progress.total} label=${`${job.progress.done} of ${job.progress.total} ${job.progress.text ?? ""}`} />` : job.ran_ms != null ? html`<span class="muted">${span(job.ran_ms)}</span>` : "") },
  { name: "when", title: "When", num: true, cell: (job) => html`<${Time} at=${when(job)} />` },
];

/**
 * Return a page of *path*. One call of the server searches for some milliseconds: it is asked again until a page is full, or has been
 * looked for in enough jobs.
 */
async function searched(path, show) {
  let page = await api.get(path);
  while (page.next && page.jobs.length < PAGE && page.looked < MOST_LOOKED) {
    show(page);
    const more = await api.get(`${path}&cursor=${encodeURIComponent(page.next)}`);
    const looked = page.looked + more.looked;
    page = { ...more, looked, jobs: [...page.jobs, ...more.jobs], footer: more.footer && `Searched ${num(looked)} of ${num(more.total)} jobs.` };
  }
  return page;
}

function Jobs({ route }) {
  const filter = route.query.filter ?? "";
  const state = valueOf(filter, "state:");
  const queue = valueOf(filter, "queue:");
  const [chosen, setChosen] = useState(new Set());
  const [all, setAll] = useState(false);
  const [more, setMore] = useState({ pages: [], next: undefined });
  const [over, setOver] = useState(false);
  const answer = useQuery(`jobs${query({ filter, limit: PAGE })}`, { load: searched, hold: chosen.size > 0 || all || over || more.pages.length > 0 });
  const counts = useQuery(`jobs/counts${query({ queue: queue.includes("*") ? "" : queue })}`, { every: 3000 });
  const matching = useQuery(filter && (chosen.size > 0 || all) ? `jobs/matching${query({ filter })}` : null, { every: 60000 });
  useEffect(() => { setChosen(new Set()); setAll(false); setMore({ pages: [], next: undefined }); }, [filter]);
  const rows = useMemo(() => [...(answer.data?.jobs ?? []), ...more.pages.flat()], [answer.data, more.pages]);
  const next = more.next === undefined ? answer.data?.next : more.next;
  const tab = (name) => href("jobs", { filter: [name && `state:${name}`, without(filter, "state:")].filter(Boolean).join(" ") });
  const fetchMore = () => attempt(async () => {
    const page = await api.get(`jobs${query({ filter, limit: PAGE, cursor: next })}`);
    setMore({ pages: [...more.pages, page.jobs], next: page.next ?? null });
  });
  const clear = () => { setChosen(new Set()); setAll(false); };
  const filterError = answer.error && (answer.error.status === 422 || answer.error.status === 400) ? answer.error : null;
  return html`<${Head} title="Jobs" />
    <${FilterBar} value=${filter} error=${filterError} />
    <nav class="tabs" aria-label="States"><a href=${tab("")} aria-current=${state ? null : "true"}>All</a>${TABS.map((name) => html`<a href=${tab(name)} aria-current=${state === name ? "true" : null}><i class="dot" data-state=${name}></i>${stateWord(name)}<span class="n">${counts.data?.[name] == null ? "" : num(counts.data[name])}</span></a>`)}</nav>
    <${Operations} />
    <${Answer} of=${filterError ? { data: answer.data, error: answer.data ? null : {} } : answer}>${(data) => html`<section class="card" aria-label="Jobs" onMouseEnter=${() => setOver(true)} onMouseLeave=${() => setOver(false)}>
      ${rows.length ? html`<${Table} label="Jobs" rows=${rows} keyOf=${(job) => job.id} columns=${columnsOf(state)} chosen=${all ? new Set(rows.map((job) => job.id)) : chosen} onChoose=${(set) => { setAll(false); setChosen(set); }} />`
        : filter ? html`<${Empty} title="No job matches">${data.footer ?? "Take a word out of the filter, or look at another state."}<//>`
          : html`<${Empty} title="No job here" code=${"@app.task\ndef greet(name: str) -> str: ...\n\ngreet.enqueue(\"Ada\")"}>Jobs stand here as soon as one is enqueued.<//>`}
      ${(data.footer || next) && html`<div class="foot row between"><span>${data.footer ?? ""}</span>${next && html`<button class="small" onClick=${fetchMore}>Show more</button>`}</div>`}</section>`}<//>
    ${(chosen.size > 0 || all) && html`<${ActionBar} rows=${rows.filter((job) => chosen.has(job.id))} filter=${filter} all=${all} matching=${matching.data?.count} onAll=${() => setAll(true)} onClear=${clear} again=${answer.again} />`}`;
}

export const pages = { jobs: Jobs };
