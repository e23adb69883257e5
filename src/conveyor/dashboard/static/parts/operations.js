// Actions on many jobs: on those that are chosen, and on all that a filter matches, which the server does in the background.
import { Act, Icon, api, attempt, confirm, html, jobs, num, percent, query, toast, useLive, Meter } from "../app.js";

/** What can be done with jobs: the action, its word, its permission, and the states that it is for. */
export const ACTIONS = [
  ["retry", "Retry", "retry_jobs", ["dead"], "become ready again", "are ready again"],
  ["promote", "Run now", "retry_jobs", ["scheduled"], "become ready now", "are ready now"],
  ["cancel", "Cancel", "cancel_jobs", ["ready", "scheduled", "waiting", "leased"], "are cancelled; running ones are asked to stop", "are cancelled"],
  ["delete", "Delete", "delete_jobs", ["ready", "scheduled", "waiting", "dead"], "are deleted with all arguments; this cannot be undone", "are deleted"],
];
const WORDS = Object.fromEntries(ACTIONS.map(([name, word]) => [name, word]));

const sum = (states, wanted) => Object.entries(states ?? {}).reduce((n, [state, count]) => n + (wanted.includes(state) ? count : 0), 0);

/** Ask how many jobs *filter* matches, ask the person, and let the server do *name* to all of them. Returns the operation. */
export async function actOnMatching(name, filter, extra = {}) {
  const [, word, , states, effect] = ACTIONS.find(([action]) => action === name);
  const found = await api.get(`jobs/matching${query({ filter, ...extra })}`);
  const n = found.states && Object.keys(found.states).length ? sum(found.states, states) : found.count;
  if (!n) { toast(`No job that matches can be ${name === "retry" ? "retried" : name === "cancel" ? "cancelled" : name === "promote" ? "run now" : "deleted"}.`); return null; }
  const about = found.exact === false ? "About " : "";
  if (!(await confirm(`${word} all that match?`, html`${about}${jobs(n, effect)}. Chosen by <code>${filter}</code>.`, `${word} ${num(n)}`, { danger: name !== "retry" && name !== "promote" }))) return null;
  const { operation } = await api.post("operations", { action: name, filter, ...extra });
  toast(`${word}: started for ${jobs(n)}.`);
  follow(operation, name);
  return operation;
}

/** Tell what became of an operation when it has ended. */
async function follow({ id }, name) {
  const [, word, , , , after] = ACTIONS.find(([action]) => action === name);
  for (;;) {
    await new Promise((go) => { setTimeout(go, 500); });
    const { operation: one } = await api.get(`operation${query({ id })}`).catch(() => ({ operation: null }));
    if (!one || one.state === "failed") return; // the server has gone; and what failed stands on the page
    if (one.state !== "running") {
      toast(`${jobs(one.done, after)}.${one.refused ? ` ${jobs(one.refused, "are unchanged")}.` : ""}${one.state === "stopped" ? ` ${word} was stopped.` : ""}`);
      return;
    }
  }
}

/** The buttons for jobs that are chosen one by one, or for all that match. */
export function ActionBar({ rows, filter, all, matching, onAll, onClear, again }) {
  const states = new Set(rows.map((row) => row.state));
  const run = async (name) => {
    if (all) { if (await actOnMatching(name, filter)) { onClear(); again(); } return; }
    const [, word, , wanted, effect, after] = ACTIONS.find(([action]) => action === name);
    const ids = rows.filter((row) => wanted.includes(row.state)).map((row) => row.id);
    if (name !== "retry" && name !== "promote" && !(await confirm(`${word} ${jobs(ids.length)}?`, `${jobs(ids.length, effect)}.`, `${word} ${num(ids.length)}`))) return;
    const answer = await api.post("jobs/actions", { action: name, ids });
    const refused = answer.results.filter((one) => ["refused", "not found"].includes(one.outcome));
    toast(`${jobs(answer.done, after)}.${refused.length ? ` ${jobs(refused.length, "are unchanged")}: ${refused[0].detail || refused[0].outcome}` : ""}`, { error: refused.length > 0 });
    onClear();
    again();
  };
  return html`<div class="bar" role="toolbar" aria-label="Actions on the chosen jobs">
    <strong>${all ? `All ${matching == null ? "" : num(matching)} that match` : `${num(rows.length)} chosen`}</strong>
    ${!all && filter && matching > rows.length && html`<button class="plain" onClick=${onAll}>Choose all ${num(matching)} that match</button>`}
    ${ACTIONS.map(([name, word, permission, wanted]) => (all || wanted.some((state) => states.has(state))) && html`<${Act} action=${permission} kind=${name === "delete" ? "danger" : ""} run=${() => run(name)}>${word}<//>`)}
    <button class="plain" onClick=${onClear}>Clear</button></div>`;
}

/** The operations that run, each with its progress. */
export function Operations() {
  const list = (useLive()?.operations ?? []).filter((one) => one.state === "running" || one.state === "failed");
  if (!list.length) return null;
  return html`<section class="card notices" aria-label="Operations">${list.map((one) => html`<div class="notice" data-state=${one.state === "failed" ? "dead" : "leased"}><${Icon} name=${one.state === "failed" ? "failures" : "play"} />
    <span>${WORDS[one.action] ?? one.action} ${one.filter ? html`<code>${one.filter}</code>` : ""} ${one.state === "failed" ? html`failed: ${one.error}` : html`${num(one.done)}${one.total ? ` of ${num(one.total)} (${percent(one.done, one.total)})` : ""}${one.refused ? `, ${num(one.refused)} not changed` : ""}`}</span>
    ${one.state === "running" && html`<span class="links"><${Meter} used=${one.done} most=${one.total} label=${`${one.done} of ${one.total}`} /><button class="small" onClick=${() => attempt(() => api.post("operations/stop", { id: one.id }))}>Stop</button></span>`}</div>`)}</section>`;
}
