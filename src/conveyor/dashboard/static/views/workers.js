// The page of workers.
import { Answer, Card, Head, html, jobs, num, useQuery } from "../app.js";
import { NoWorker, WorkerTable } from "../parts/workers.js";

function Workers() {
  const answer = useQuery("workers");
  const rows = answer.data?.workers ?? [];
  const slots = answer.data?.slots;
  const silent = rows.filter((worker) => worker.silent).length;
  return html`<${Head} title="Workers" sub=${rows.length > 0 && `${num(rows.length)} ${rows.length === 1 ? "process holds" : "processes hold"} ${jobs(rows.reduce((sum, worker) => sum + worker.held, 0))}${slots?.total ? `, ${num(slots.used)} of ${num(slots.total)} slots used` : ""}${silent ? `; ${num(silent)} ${silent === 1 ? "does" : "do"} not answer: jobs are taken back when the leases end` : ""}`} />
    <${Answer} of=${answer}>${(data) => html`<${Card} body=${false} label="Workers">${data.workers.length ? html`<${WorkerTable} rows=${data.workers} again=${answer.again} />` : html`<${NoWorker} />`}${data.footer && html`<div class="foot">${data.footer}</div>`}<//>`}<//>`;
}

export const pages = { workers: Workers };
