// Failures: what failed alike, over time. A cell opens its jobs; a group or a cell is retried or deleted as a whole.
import { Act, Answer, Card, Empty, Head, Tabs, Time, clockText, html, jobHref, jobsHref, num, queueHref, shown, span, useParam, useQuery, useState } from "../app.js";
import { Operations, actOnMatching } from "../parts/operations.js";

const RANGES = [["1h", "1 h"], ["6h", "6 h"], ["24h", "24 h"], ["7d", "7 d"], ["30d", "30 d"]];
const iso = (seconds) => new Date(seconds * 1000).toISOString().replace(".000", "");

function Strip({ group, times, step, most, chosen, onChoose }) {
  return html`<div class="strip" role="group" aria-label=${`Failures of ${group.task} over time`}>${group.cells.map((n, i) => html`<button disabled=${!n} aria-pressed=${String(chosen === i)} style=${{ "--heat": n ? 20 + 80 * Math.sqrt(n / most) : 0 }}
    title=${`${clockText(times[i] * 1000).slice(5, 16)} and ${span(step * 1000)} on: ${num(n)}`} aria-label=${`${clockText(times[i] * 1000).slice(5, 16)}: ${n} failed`} onClick=${() => onChoose(i)}></button>`)}</div>`;
}

function Failures() {
  const [range, setRange] = useParam("range", "24h", RANGES);
  const [cell, setCell] = useState(null);
  const answer = useQuery(`failures?range=${range}`, { every: 3000, hold: cell != null });
  const data = answer.data;
  const most = Math.max(1, ...(data?.groups ?? []).flatMap((group) => group.cells));
  const filterOf = (group, i) => (i == null ? group.filter : `${group.filter} since:${iso(data.times[i])} older:${iso(data.times[i] + data.step - 0.001)}`);
  const buttons = (filter) => html`<${Act} action="retry_jobs" kind="small" again=${answer.again} run=${() => actOnMatching("retry", filter)}>Retry<//> <${Act} action="delete_jobs" kind="small danger" again=${answer.again} run=${() => actOnMatching("delete", filter)}>Delete<//>`;
  return html`<${Head} title="Failures" sub="Dead jobs, put together by task, exception and the line of your code that raised it." ><${Tabs} label="Period" options=${RANGES} value=${range} onChoose=${(value) => { setRange(value); setCell(null); }} /><//>
    <${Operations} />
    <${Answer} of=${answer}>${() => html`<${Card} body=${false} label="Failures">${data.groups.length ? html`<div class="scroll" tabindex="0" role="group" aria-label="Failures over time"><table class="matrix">
      <thead><tr><th scope="col">Failure</th><th class="num" scope="col">Dead</th><th class="tall" scope="col">Last</th><th scope="col"><span class="row between"><span>${clockText(data.times[0] * 1000).slice(5, 16)}</span><span>now</span></span></th><th class="tall" scope="col"><span class="hidden">actions</span></th></tr></thead>
      <tbody>${data.groups.map((group) => {
        const mine = cell?.fingerprint === group.fingerprint ? cell.i : null;
        return html`<tr key=${group.fingerprint}>
          <td><a class="name" href=${jobsHref(group.filter)}>${group.task || "message"}</a> <a class="tag" href=${queueHref(group.queue)}>${group.queue}</a>
            <span class="sub clip"><b>${shown(group.type)}</b>${group.message ? `: ${shown(group.message)}` : ""}</span>${group.frame && html`<span class="sub clip mono">${shown(group.frame)}</span>`}</td>
          <td class="num"><a href=${jobsHref(group.filter)}>${num(group.count)}</a></td>
          <td class="tall"><a class="quiet" href=${jobHref(group.id)}><${Time} at=${group.last} /></a></td>
          <td class="cells"><${Strip} group=${group} times=${data.times} step=${data.step} most=${most} chosen=${mine} onChoose=${(i) => setCell(mine === i ? null : { fingerprint: group.fingerprint, i })} /></td>
          <td class="actions tall">${buttons(group.filter)}</td></tr>
        ${mine != null && html`<tr key=${`${group.fingerprint}-cell`}><td colspan="5"><div class="row"><strong>${num(group.cells[mine])} from ${clockText(data.times[mine] * 1000)} on, ${span(data.step * 1000)} long</strong> <a class="button small" href=${jobsHref(filterOf(group, mine))}>Open them</a> ${buttons(filterOf(group, mine))}</div></td></tr>`}`;
      })}</tbody></table></div>` : html`<${Empty} title="No dead job in this period">A job is dead when it failed at all its attempts. It stays with its arguments and errors until it is retried or deleted.<//>`}
      ${(data.footer || data.read < data.total) && html`<div class="foot">${data.footer ?? `The newest ${num(data.read)} of ${num(data.total)} dead jobs were read.`}</div>`}<//>`}<//>`;
}

export const pages = { failures: Failures };
