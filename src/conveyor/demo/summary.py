"""The closing words of the demo: the accounts as a person reads them."""

from __future__ import annotations

import time

import click

from conveyor.cli.output import count
from conveyor.demo.account import Account, KillAccount
from conveyor.duration import span

_HEADINGS = f"{'TASK':<18}{'ACCEPTED':>9}{'DONE':>7}{'DEAD':>6}{'RUNS':>7}{'RETRIES':>9}{'MEDIAN':>10}{'P95':>10}"


def summary(account: Account) -> list[str]:
    """Return the accounts, a line each."""
    parts = [
        ("done", account.done, "the queue says so, and the task itself wrote it down"),
        ("dead", account.dead, "kept as dead letters, with their errors"),
        ("cancelled", account.cancelled, ""),
        ("left", account.left, "still in the queue when time was up" if account.left else ""),
        ("lost", account.lost, "every acknowledged id was looked up"),
    ]
    lines = [
        "",
        f"{click.style('accepted', bold=True):<10} {account.accepted:>8,}",
        *(f"  {name:<10}{number:>7,}" + (f"  {click.style(why, dim=True)}" if why else "") for name, number, why in parts),
        "",
        *(line for kill in account.kills for line in _kill(kill)),
        *_runs(account),
        "",
        click.style(_HEADINGS, dim=True),
        *(
            f"{one.task:<18}{one.accepted:>9,}{one.done:>7,}{one.dead:>6,}{one.runs:>7,}{one.retries:>9,}"
            f"{_ms(one.median_ms):>10}{_ms(one.p95_ms):>10}"
            for one in account.tasks
        ),
        "",
    ]  # fmt: skip
    if account.sound:
        sums = " + ".join(f"{number:,} {name}" for name, number, _ in parts[:4] if number or name == "done")
        lines.append(
            click.style("✓ The counts add up: ", fg="green")
            + f"{account.accepted:,} accepted = {sums}. Nothing was lost."
        )
    else:
        lines += [click.style("✗ Something is wrong: ", fg="red") + problem for problem in account.problems]
    return lines


def _kill(kill: KillAccount) -> list[str]:
    at = time.strftime("%H:%M:%S", time.localtime(kill.at))
    returned = "" if kill.returned is None else f", and {count(kill.returned, 'job')} went back"
    line = f"Worker {kill.pid} was killed at {at} while it ran {count(kill.interrupted, 'job')}{returned}."
    if kill.first_ms is None or kill.last_ms is None:
        return [line]
    first, last = span(kill.first_ms / 1000), span(kill.last_ms / 1000)
    return [line, f"  {kill.again} of the {kill.interrupted} began again, the first {first} and the last {last} later."]


def _runs(account: Account) -> list[str]:
    again = sum(kill.again for kill in account.kills)
    killed = f", {again:,} after the kill" if account.kills else ""
    twice = "No job succeeded twice."
    if account.done_twice:
        twice = f"{account.done_twice:,} succeeded twice: cut off between the work and saying so."
    return [f"{count(account.runs, 'run')}: {account.retries:,} again after a failure{killed}.", twice]


def _ms(ms: float) -> str:
    return f"{ms:,.1f} ms" if ms < 10 else f"{ms:,.0f} ms"
