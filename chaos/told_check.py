"""Checks of what jobs tell while they run, and of schedules: what jobs wrote down themselves, beside what the reader was told."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from chaos.run_data import TICK, Line, Run, RunData, normal
from chaos.run_result import RunResult

PERIOD = 1000
"""Milliseconds from one instant of a schedule to the next."""
FAILURE = "RuntimeError"
"""The error of an attempt that is meant to fail. Others come from outside: the worker stops, or the lease is lost."""
EXPIRED = ("JobNotFound", "ResultExpired")
"""The errors of what is not kept any more."""
EVENTS = "told:"
"""Beginning of the ids of jobs whose queue keeps events."""


@dataclass
class Told:
    """Lines that one attempt wrote down: the notes it found, and those it had last; how many parts it emitted."""

    found: int = 0
    mark: int = 0
    parts: int = 0


@dataclass
class Reads:
    """Lines of the reader on one job, in order."""

    parts: list[Line] = field(default_factory=list)
    updates: list[Line] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)
    """`part`, `update`: what came to its end."""
    progress: list[str | None] = field(default_factory=list)
    errors: list[Line] = field(default_factory=list)


def check_told(data: RunData, result: RunResult) -> None:
    """Check notes, streams, progress, updates and events of the jobs that tell something."""
    for name in ("notes found", "parts read", "updates read", "events read", "reads left"):
        result.counts[name] = 0
    said = _said(data)
    for id_, attempts in said.items():
        _check_notes(data, id_, attempts, result)
    if not data.reads:
        return
    reads = _reads(data, result)
    stepped = any(fault["kind"] == "step clock" for fault in data.faults)
    for id_, one in reads.items():
        last = _accepted(data, id_)
        if stepped and any(line["why"].startswith(EXPIRED) for line in one.errors):
            continue  # by the clock of the server it ended more than an hour ago, and is forgotten
        for line in one.errors:
            result.note(f"{LAWS[line['what']]} violations", f"{id_}: the reader got {line['why']}")
        if last is None or id_ in data.dump.live:
            continue  # lost, dead or stuck, and counted so
        _check_stream(data, id_, last, said.get(id_, {}), one, result)
        _check_updates(data, id_, last, one, result)
        wanted = f"{last}/{said[id_][last].parts}" if last in said.get(id_, {}) else None
        if one.progress and one.progress[-1] != wanted:
            result.note("progress violations", f"{id_}: it said {wanted} last, and the reader got {one.progress[-1]}")
        if not one.progress and not one.errors:
            result.note("progress violations", f"{id_}: the reader has not asked for its progress")
    _check_events(data, result)


LAWS = {"part": "stream", "update": "update", "progress": "progress", "event": "event"}
"""Source of what is read → the word of its line in the table."""


def _said(data: RunData) -> dict[str, dict[int, Told]]:
    """Return id → attempt → what it told."""
    said: dict[str, dict[int, Told]] = defaultdict(lambda: defaultdict(Told))
    for line in data.told:
        told = said[normal(line["id"])][line["attempt"]]
        if line["phase"] == "found":
            told.found = told.mark = line["mark"]
        else:
            told.mark, told.parts = line["mark"], line["number"]
    return said


def _reads(data: RunData, result: RunResult) -> dict[str, Reads]:
    reads: dict[str, Reads] = defaultdict(Reads)
    for line in data.reads:
        phase = line["phase"]
        if phase == "left":
            result.counts["reads left"] += 1
        elif phase == "error" and not line["id"]:
            result.note(f"{LAWS[line['what']]} violations", f"the reader got {line['why']}")
        elif phase == "part":
            result.counts["parts read"] += 1
            reads[normal(line["id"])].parts.append(line)
        elif phase == "update":
            result.counts["updates read"] += 1
            reads[normal(line["id"])].updates.append(line)
        elif phase == "progress":
            reads[normal(line["id"])].progress.append(line["text"])
        elif phase == "error":
            reads[normal(line["id"])].errors.append(line)
        elif phase.endswith(" end"):
            reads[normal(line["id"])].ended.add(phase.removesuffix(" end"))
    return reads


def _accepted(data: RunData, id_: str) -> int | None:
    """Return the attempt whose end counted; None where that is not recorded."""
    record = data.record(id_)
    value = record.get("value") if record else None
    return int(value["attempt"]) if isinstance(value, dict) and "attempt" in value else None


def _settled(data: RunData, run: Run, until: float) -> bool:
    """Tell whether the failure of *run* was surely taken before *until*: its job was not taken away from its worker meanwhile."""
    if run.end is None or run.why != FAILURE or run.end > until:
        return False
    if data.history is not None:
        return not any(run.id in ids for _, ids in data.history.taken)
    struck, common = data.struck()
    since = run.start - data.lease
    return run.pid not in struck and not any(fault["at"] < until and fault["until"] > since for fault in common)


# -- notes -------------------------------------------------------------------------------------------------------------


def _check_notes(data: RunData, id_: str, attempts: dict[int, Told], result: RunResult) -> None:
    """An attempt finds the last notes of the one before; after a crash some that were noted, none older than that one found."""
    runs = data.runs.get(id_, [])
    for before, after in itertools.pairwise(runs):
        if before.attempt not in attempts or after.attempt not in attempts or after.attempt <= before.attempt:
            continue
        first, then = attempts[before.attempt], attempts[after.attempt]
        result.counts["notes found"] += 1
        most = max(one.mark for number, one in attempts.items() if number < after.attempt)
        if not first.found <= then.found <= most:
            wanted = f"between {first.found} and {most}"
        elif _settled(data, before, after.start) and after.attempt == before.attempt + 1 and then.found != first.mark:
            wanted = str(first.mark)
        else:
            continue
        result.note("note violations", f"{id_}: attempt {after.attempt} found {then.found} and not {wanted}")


# -- parts, updates, events --------------------------------------------------------------------------------------------


def _check_stream(
    data: RunData, id_: str, last: int, attempts: dict[int, Told], reads: Reads, result: RunResult
) -> None:
    """Each part comes once and in order, of the attempt that ended the job all of them; the stream ends."""
    known: dict[int, int] = {}
    attempt = 0
    for line in reads.parts:
        number = known.get(line["attempt"], 0) + 1
        known[line["attempt"]] = number
        if line["attempt"] < attempt or line["part"] != f"{line['attempt']}-{number}":
            result.note("stream violations", f"{id_}: part {line['part']} came where {attempt}-{number} was due")
            return
        if line["value"] != [line["attempt"], number]:
            result.note("stream violations", f"{id_}: part {line['part']} is {line['value']}")
            return
        attempt = line["attempt"]
    runs = {run.attempt: run for run in data.runs.get(id_, [])}
    starts = sorted(run.start for run in runs.values())
    for number, told in attempts.items():
        read = known.get(number, 0)
        whole = number == last
        if not whole and number in runs:
            following = next((at for at in starts if at > runs[number].start), 0.0)
            whole = _settled(data, runs[number], following)
        if (whole and read != told.parts) or read > told.parts:
            result.note(
                "stream violations", f"{id_}: attempt {number} emitted {told.parts} parts, and {read} were read"
            )
    if "part" not in reads.ended and not reads.errors:
        result.note("stream violations", f"{id_}: it has ended, and its stream has not")
    if known.keys() - attempts.keys():
        result.note("stream violations", f"{id_}: parts of attempts {sorted(known)}, and {sorted(attempts)} ran")


def _check_updates(data: RunData, id_: str, last: int, reads: Reads, result: RunResult) -> None:
    """The start of each attempt and the end of the job come once and in order."""
    for before, after in itertools.pairwise(reads.updates):
        # One that is handed back before it has begun comes again, with the number that it had.
        same = after["attempt"] == before["attempt"] and before["state"] == after["state"] == "leased"
        again = after["update"] == before["update"] or (same and after["kind"] == "StateChanged")
        if again or after["attempt"] < before["attempt"] or before["kind"] == "JobEnded":
            result.note("update violations", f"{id_}: {after['update']} came after {before['update']}")
    started = {line["attempt"] for line in reads.updates if line["state"] == "leased"}
    ran = {run.attempt for run in data.runs.get(id_, []) if run.attempt <= last}
    if started != set(range(1, last + 1)) or not ran <= started:
        result.note(
            "update violations",
            f"{id_}: starts {sorted(started)} were told, attempts {sorted(ran)} ran, {last} ended it",
        )
    elif "update" not in reads.ended:
        if not reads.errors:
            result.note("update violations", f"{id_}: it has ended, and its updates have not")
    elif (final := reads.updates[-1])["state"] != "done" or final["attempt"] != last:
        result.note("update violations", f"{id_}: attempt {last} ended it, and {final['update']} was told")


def _check_events(data: RunData, result: RunResult) -> None:
    """Each event comes once; each attempt that ran has a start, each job that is done has one end, of the attempt that counted."""
    events = [line for line in data.reads if line["phase"] == "event"]
    result.counts["events read"] = len(events)
    for name, times in Counter(line["event"] for line in events).items():
        if times > 1:
            result.note("event violations", f"event {name} came {times} times")
    by_job: dict[str, list[Line]] = defaultdict(list)
    for line in events:
        by_job[normal(line["id"])].append(line)
    full = [fault for fault in data.faults if fault["kind"] == "squeeze memory"]
    for id_, runs in data.runs.items():
        last = _accepted(data, id_) if id_.startswith(EVENTS) and id_ not in data.dump.live else None
        if last is None:
            continue
        ends = [line["attempt"] for line in by_job[id_] if line["name"] == "done"]
        starts = [line["attempt"] for line in by_job[id_] if line["name"] == "started"]
        back = Counter(line["attempt"] for line in by_job[id_] if line["name"] == "returned")
        often = [number for number, times in Counter(starts).items() if times > 1 + back[number]]
        ran = {run.attempt for run in runs if run.attempt <= last}
        if ends not in ([], [last]):
            result.note("event violations", f"{id_}: ends {ends}; attempt {last} ended it")
        elif not ends or often or not ran <= set(starts):
            until = max(run.end or run.start for run in runs) + data.lease
            if any(fault["at"] < until and fault["until"] > runs[0].start - data.lease for fault in full):
                continue  # Redis refuses events when it is full, and not the job
            result.note(
                "event violations", f"{id_}: starts {starts}, ends {ends}, back {dict(back)}; {sorted(ran)} ran"
            )


# -- schedules ---------------------------------------------------------------------------------------------------------


def check_ticks(data: RunData, result: RunResult) -> None:
    """Each instant of a schedule has one job that ran, or is counted as skipped; no instant is both."""
    result.counts["ticks"] = result.counts["ticks skipped"] = 0
    ran: dict[str, dict[int, set[str]]] = defaultdict(dict)
    for token, ids in data.by_token.items():
        if token.startswith(TICK):
            _, name, instant = token.split("/")
            ran[name][int(instant)] = ids
    first = {line["schedule"]: line for line in data.reads if line["phase"] == "put"}
    last = {line["schedule"]: line for line in data.reads if line["phase"] == "stood"}
    for name in ran.keys() - first.keys():
        result.note("unexpected", f"{len(ran[name])} ticks of a schedule {name} that nobody has put")
    for name, put in first.items():
        if name not in last:
            result.note("tick violations", f"{name}: where it stands at the end is not known")
            continue
        skips = {
            instant: count for line in data.reads if line.get("schedule") == name for instant, count, _ in line["skips"]
        }
        _check_schedule(name, put, last[name], ran[name], skips, result)


def _check_schedule(
    name: str, put: Line, stood: Line, ran: dict[int, set[str]], skips: dict[int, int], result: RunResult
) -> None:
    fired, skipped = stood["fired"] - put["fired"], stood["skipped"] - put["skipped"]
    result.counts["ticks"] += len(ran)
    earlier = [instant for instant in ran if instant < put["due"]]  # before anybody had read where it stands
    if len(earlier) != put["fired"]:
        result.note("tick violations", f"{name}: {put['fired']} instants were fired, and jobs of {earlier} started")
    ran = {instant: ids for instant, ids in ran.items() if instant >= put["due"]}
    result.counts["ticks skipped"] += skipped
    for instant, ids in ran.items():
        if (instant - put["due"]) % PERIOD or instant >= stood["due"]:
            result.note("tick violations", f"{name}: {instant} is no instant from {put['due']} to {stood['due']}")
        if len(ids) > 1:
            result.note("tick violations", f"{name}: {instant} started as {sorted(ids)}")
    for instant, count in skips.items():
        both = [one for one in ran if instant <= one < instant + PERIOD * count]
        if both:
            result.note("tick violations", f"{name}: {both} were skipped and started")
    passed = (stood["due"] - put["due"]) // PERIOD
    if fired != len(ran):
        result.note("tick violations", f"{name}: {fired} instants were fired, and jobs of {len(ran)} started")
    if passed != len(ran) + skipped:
        result.note(
            "tick violations",
            f"{name}: {passed} instants passed, {len(ran)} started and {skipped} are counted as skipped",
        )
