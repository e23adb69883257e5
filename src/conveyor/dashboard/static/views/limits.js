// The page of limits and groups.
import { Answer, Card, Empty, Head, html, useQuery } from "../app.js";
import { GroupTable, LimitTable } from "../parts/limits.js";

function Limits() {
  const answer = useQuery("limits");
  return html`<${Head} title="Limits and groups" sub="A change here wins over the code's number until it is reset." />
    <${Answer} of=${answer}>${(data) => html`
      <${Card} title="Limits" body=${false}>${data.limits.length ? html`<${LimitTable} queues rows=${data.limits} again=${answer.again} />` : html`<${Empty} title="No limits yet" code=${"from conveyor import Concurrency, Rate\n\n@app.task(limits=[Rate(100, \"1m\"), Concurrency(2, by=\"tenant\")])\ndef send(user: int, tenant: str) -> None: ..."}>A limit bounds how many jobs start in a period, or run at once. Jobs that wait at one hold no worker.<//>`}<//>
      <${Card} title="Groups" body=${false}>${data.groups.length ? html`<${GroupTable} queues rows=${data.groups} again=${answer.again} />` : html`<${Empty} title="No group has jobs now" code=${"@app.task(group_by=\"tenant\")\ndef sync(tenant: str) -> None: ..."}>Jobs of one group run in order, one at a time; groups take turns.<//>`}<//>
      ${data.footer && html`<p class="small muted">${data.footer}</p>`}`}<//>`;
}

export const pages = { limits: Limits };
