// JSON and tracebacks as text. Numbers are never parsed: a browser would change those beyond 2^53.
import { Icon, bytes, copy, html, num, shown } from "../app.js";

/** Break JSON text into lines, without reading its values. Text that is no JSON stays as it is. */
export function pretty(text) {
  const tokens = text.match(/"(?:\\.|[^"\\])*"|[[\]{},:]|[^\s[\]{},:"]+/g);
  if (!tokens || !/^\s*[[{]/.test(text) || text.length > 100_000) return text;
  let out = "", depth = 0;
  const line = () => `\n${"  ".repeat(depth)}`;
  tokens.forEach((token, i) => {
    const next = tokens[i + 1], before = tokens[i - 1];
    if (token === "{" || token === "[") { depth += 1; out += token + (next === "}" || next === "]" ? "" : line()); }
    else if (token === "}" || token === "]") { depth = Math.max(0, depth - 1); out += (before === "{" || before === "[" ? "" : line()) + token; }
    else if (token === ",") out += token + line();
    else out += token === ":" ? ": " : token;
  });
  return out;
}

/** Text that is kept, with a button that copies it whole. */
export const JsonText = ({ text, size, label, whole }) => html`<div class="stack"><pre class="text" tabindex="0" role="group" aria-label=${label}>${shown(pretty(text))}</pre><div class="row small muted"><button class="small" onClick=${() => copy(text)}><${Icon} name="copy" size=${13} />${text.endsWith("…") ? "Copy the beginning" : "Copy"}</button>${text.endsWith("…") && html`<span>The first ${num(text.length - 1)} characters of ${bytes(size)}. All of it: <code>${shown(whole)}</code></span>`}</div></div>`;

const frame = (one) => html`<div class=${one.own ? "user" : ""}><div class="where">${shown(one.file)}:${one.line} in ${shown(one.function)}</div>${one.code && html`<div class="code">${shown(one.code)}</div>`}</div>`;
const MOST_FRAMES = 8;
const folded = (list, of) => list.length > 0 && html`<details><summary>${list.length === 1 ? "1 frame" : `${num(list.length)} frames`} ${of}</summary>${list.map(frame)}</details>`;

/** An error: its type and message, the frames of the program first, those of libraries folded. */
export function Traceback({ error }) {
  const frames = error.frames ?? [];
  const [own, others] = [true, false].map((mine) => frames.filter((one) => Boolean(one.own) === mine).reverse());
  const first = own.length ? own : others;
  return html`<div class="trace" role="group" tabindex="0" aria-label=${`Error of attempt ${error.attempt}`}>
    <div class="last">${shown(error.type)}${error.message ? `: ${shown(error.message)}` : ""}</div>
    ${first.slice(0, MOST_FRAMES).map(frame)}
    ${folded(first.slice(MOST_FRAMES), "further out")}
    ${own.length > 0 && folded(others, "of libraries")}
    ${error.traceback && html`<details><summary>The whole traceback</summary><div>${shown(error.traceback)}</div><div><button class="small" onClick=${() => copy(error.traceback)}>Copy</button></div></details>`}</div>`;
}

/** Return the JSON text of arguments as it is, or raise what is wrong with it. */
export function checked(text) {
  try { JSON.parse(text); } catch (error) { throw new Error(`The arguments are no JSON: ${error.message}`); }
  return text;
}
