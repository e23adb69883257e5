// JSON and tracebacks as text. Numbers are never parsed: a browser would change those beyond 2^53.
import { Icon, copy, html, num } from "../app.js";

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
export const JsonText = ({ text, size, label }) => html`<div class="stack"><pre class="text" tabindex="0" role="group" aria-label=${label}>${pretty(text)}</pre><div class="row small muted"><button class="small" onClick=${() => copy(text)}><${Icon} name="copy" size=${13} />Copy</button>${size > text.length * 2 && html`<span>The first ${num(text.length)} characters of ${num(size)} bytes.</span>`}</div></div>`;

const frame = (one) => html`<div class=${one.own ? "user" : ""}><div class="where">${one.file}:${one.line} in ${one.function}</div>${one.code && html`<div class="code">${one.code}</div>`}</div>`;

/** An error: its type and message, the frames of the program first, those of libraries folded. */
export function Traceback({ error }) {
  const frames = error.frames ?? [];
  const own = frames.filter((one) => one.own), others = frames.filter((one) => !one.own);
  return html`<div class="trace" role="group" tabindex="0" aria-label=${`Error of attempt ${error.attempt}`}>
    <div class="last">${error.type}${error.message ? `: ${error.message}` : ""}</div>
    ${[...own].reverse().map(frame)}
    ${own.length > 0 && others.length > 0 && html`<details><summary>${others.length === 1 ? "1 frame" : `${num(others.length)} frames`} of libraries</summary>${[...others].reverse().map(frame)}</details>`}
    ${own.length === 0 && [...others].reverse().map(frame)}
    ${error.traceback && html`<details><summary>The whole traceback</summary><div>${error.traceback}</div><div><button class="small" onClick=${() => copy(error.traceback)}>Copy</button></div></details>`}</div>`;
}
