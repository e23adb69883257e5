"""The chaos checker, tested with histories written for it: each kind of error is found, and a clean run passes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from chaos.checker import check
from chaos.redis_history import History, transactions
from chaos.remaining_state import RemainingState, take
from chaos.report import ROWS
from chaos.run_data import gather
from chaos.run_log import RunLog, read
from chaos.run_result import MUST_BE_ZERO, RunResult, spread

ID = "default:0Q8BSAkvxDi695FnFb8ddl"
BARE = ID.partition(":")[2]
ENVELOPE = "\nquick\n{}"
P = "chaos:{default}:"


class RunBuilder:
    """Builds the data of a run step by step: lines of the programs, and the history of Redis."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.faults: list[dict[str, Any]] = []
        self.told: list[dict[str, Any]] = []
        self.reads: list[dict[str, Any]] = []
        self.history = History()
        self.dump = RemainingState()
        self.now = 100.0

    def later(self, seconds: float = 1.0) -> RunBuilder:
        self.now += seconds
        return self

    def push(
        self, token: str = "1.1.0", id_: str = ID, *, kind: str = "quick", ends: str = "ok", **facts: Any
    ) -> RunBuilder:
        call = {
            "call": token,
            "phase": "intent",
            "kind": kind,
            "prefix": token[:-1],
            "first": int(token[-1]),
            "count": 1,
        }
        self.calls.append({**call, "at": self.now, **facts})
        if ends in {"ok", "existing"}:
            existing = [0] if ends == "existing" else []
            self.calls.append({"call": token, "phase": "ok", "ids": [id_], "existing": existing, "at": self.now})
        elif ends == "refused":
            self.calls.append({"call": token, "phase": "refused", "at": self.now})
        return self

    def run(
        self, phase: str = "ok", *, id_: str = ID, token: str = "1.1.0", attempt: int = 1, pid: int = 7
    ) -> RunBuilder:
        facts = {"token": token, "id": id_, "attempt": attempt, "pid": pid}
        self.runs.append({"phase": "start", "at": self.now, **facts})
        if phase:
            self.runs.append({"phase": phase, "at": self.now + 0.5, **facts})
        return self.later()

    def wrote(self, *commands: str) -> RunBuilder:
        self.history.apply([[part.encode() for part in command.split("|")] for command in commands])
        return self

    def stored(self, bare: str = BARE, head: str = "") -> RunBuilder:
        return self.wrote(f"HSET|{P}jobs|{bare}|{head}{ENVELOPE}", f"RPUSH|{P}ready:0|{bare}")

    def leased(self, worker: str = "w", bare: str = BARE) -> RunBuilder:
        return self.wrote(f"LPOP|{P}ready:0|1", f"HSET|{P}leased:{worker}|{bare}|8193")

    def child(self, bare: str) -> RunBuilder:
        return self.stored(bare).leased(bare=bare).done(bare=bare)

    def leave(self, place: str) -> RunBuilder:
        self.dump.live[ID] = place
        return self

    def done(self, worker: str = "w", bare: str = BARE, **value: int) -> RunBuilder:
        record = json.dumps({"status": "done", **({"value": value} if value else {})})
        return self.wrote(
            f"HDEL|{P}leased:{worker}|{bare}", f"HDEL|{P}jobs|{bare}", f"HSET|{P}results:{bare[:7]}|{bare}|9\n{record}"
        )

    def reaped(self, worker: str = "w", bare: str = BARE) -> RunBuilder:
        return self.wrote(f"DEL|{P}leased:{worker}", f"LPUSH|{P}ready:0|{bare}")

    def checked(self, **options: Any) -> RunResult:
        data = gather(
            self.calls, self.runs, self.faults, self.dump, self.history, lease=2.0, told=self.told, reads=self.reads
        )
        return check(data, **options)


def clean() -> RunBuilder:
    return RunBuilder().push().stored().leased().run().done(attempt=1, pid=7)


def clean_parent() -> RunBuilder:
    return RunBuilder().push(spawns=1).stored().leased().run().done(attempt=1, pid=7)


def together(fact: str, value: object, count: int) -> RunBuilder:
    """Build a run of so many jobs with that fact, which begin 10 ms after each other and take half a second."""
    builder = clean()
    for n in range(1, count + 1):
        builder.push(f"1.1.{n}", f"default:{n}", **{fact: value}).child(str(n))
        builder.run(id_=f"default:{n}", token=f"1.1.{n}").later(-0.99)
    return builder


def in_order(*order: int) -> RunBuilder:
    """Build a run of the jobs of a group, which begin in that order."""
    builder = clean()
    for n in sorted(order):
        builder.push(f"1.1.{n}", f"default:{n}", group="g").child(str(n)).later()
    for n in order:
        builder.run(id_=f"default:{n}", token=f"1.1.{n}")
    return builder


@pytest.mark.parametrize(
    "builder",
    [
        together("slots", [["pair", 2]], 2), together("rates", [["paced", 5, 4.0, 1]], 5), in_order(1, 2, 3),
        clean().push("1.1.1", "default:a", covers="k").push("1.1.2", "default:a", ends="existing", covers="k").child("a").run(
            id_="default:a", token="1.1.2"),
        clean().push("1.1.1", "default:a", copies=2).child("a").child("b").run(id_="default:a", token="1.1.1").run(
            id_="default:b", token="1.1.1"),
    ],
)  # fmt: skip
def test_what_limits_allow_passes(builder: RunBuilder) -> None:
    """As many as a limit allows, a group in its order, one job for several calls, and a copy for each queue are no fault."""
    assert builder.checked().failed == []


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("pids", [[7], []])
def test_a_run_without_its_lease_takes_no_slot(pids: list[int], taken: bool) -> None:
    """The work of a process whose jobs were taken from it in a fault is no violation; a fault that cost no lease excuses nothing."""
    builder = clean().wrote(f'HSET|{P}leased:old|\tabout|{{"pid": 7}}')
    builder.faults.append({"kind": "stop child", "pids": pids, "at": builder.now, "until": builder.now + 3})
    for n in (2, 1):
        builder.push(f"1.1.{n}", f"default:{n}", group="g").stored(str(n))
        if taken:
            builder.leased("old", str(n)).reaped("old", str(n)).wrote(f'HSET|{P}leased:old|\tabout|{{"pid": 7}}')
        builder.leased("new", str(n)).run(id_=f"default:{n}", token=f"1.1.{n}").done("new", str(n)).later(-0.9)
    assert builder.checked().failed == ([] if taken else ["limit violations"])


def test_a_clean_run_passes() -> None:
    """One job, pushed, leased, run and done: everything else is zero."""
    result = clean().checked()

    assert result.failed == []
    assert (result.counts["attempted"], result.counts["acknowledged"], result.counts["ok"]) == (1, 1, 1)
    assert all(result.counts[name] == 0 for name in MUST_BE_ZERO)


def test_a_repeat_with_a_higher_number_passes() -> None:
    """A job whose worker died runs again as attempt 2 and is done once: nothing is wrong, and the recovery is measured."""
    builder = RunBuilder().push().stored().leased("dead").run("")
    builder.faults.append({"kind": "kill worker", "pids": [7], "supervised": True, "at": builder.now})
    builder.later(0.25).wrote(f"ZREM|{P}workers|dead", f"DEL|{P}leased:dead", f"LPUSH|{P}ready:0|{BARE}")
    result = builder.leased("next").run(attempt=2, pid=8).done("next", attempt=2, pid=8).checked()

    assert result.failed == []
    assert result.counts["repeated executions"] == 1
    assert result.counts["recovery, supervised"] == {"count": 1, "p50": 0.25, "p99": 0.25, "max": 0.25}
    assert result.counts["unexplained repeats"] == 0


WRONG: dict[str, tuple[RunBuilder, set[str]]] = {
    "never stored": (RunBuilder().push(), {"lost"}),
    "vanished after it ran half": (RunBuilder().push().stored().leased().run("").done(), {"lost"}),
    "acknowledged before it ran": (RunBuilder().push().stored().leased().done(), {"lost"}),
    "dead without a crash of its own": (
        RunBuilder().push().stored().leased().run("failed").wrote(f"HDEL|{P}leased:w|{BARE}", f"ZADD|{P}dead|5|{BARE}"), {"lost"},
    ),
    "cancelled by nobody": (
        RunBuilder().push().stored().wrote(f"LPOP|{P}ready:0|1", f"HDEL|{P}jobs|{BARE}", f'SET|{P}result:{BARE}|{{"status":"cancelled"}}|PX|9'), {"lost"},
    ),
    "run for nobody": (clean().run(id_="default:x", token="9.9.9", attempt=1), {"unexpected"}),
    "refused and run": (clean().push("1.1.1", ends="refused").run(id_="default:y", token="1.1.1"), {"unexpected"}),
    "said to exist and run": (clean().push("1.1.1", ends="existing").run(id_="default:y", token="1.1.1"), {"unexpected"}),
    "one push, two jobs": (
        clean().stored("other").leased(bare="other").run(id_="default:other").done(bare="other"), {"unexpected"},
    ),
    "stored again after its end": (clean().stored(), {"stored twice"}),
    "the same attempt again": (
        RunBuilder().push().stored().leased().run("").run(pid=8).done(attempt=1, pid=8), {"same attempt twice"},
    ),
    "done twice": (clean().done(attempt=1, pid=7), {"duplicate outcomes"}),
    "dead after it was done": (clean().wrote(f"ZADD|{P}dead|5|{BARE}"), {"duplicate outcomes", "audit findings"}),
    "ended by who had lost it": (
        RunBuilder().push().stored().leased("old").reaped("old").leased("new").run(attempt=2).done("old", attempt=2, pid=7),
        {"zombie accepted", "audit findings"},
    ),
    "an older attempt counted": (
        RunBuilder().push().stored().leased().run().run("", attempt=2, pid=8).done(attempt=1, pid=7), {"zombie accepted"},
    ),
    "a result that nobody computed": (RunBuilder().push().stored().leased().run().done(attempt=1, pid=99), {"unexpected"}),
    "one key, two holders": (
        clean().stored("a", "\tuk").stored("b", "\tuk").leased(bare="a").leased(bare="b").done(bare="a").done(bare="b"),
        {"unique key held twice"},
    ),
    "acknowledged first, its result stored later": (
        RunBuilder().push().stored().leased().run().wrote(f"HDEL|{P}leased:w|{BARE}", f"HDEL|{P}jobs|{BARE}").wrote(
            f'SET|{P}result:{BARE}|{{"status":"done"}}|PX|9'), {"ended without result"},
    ),
    "taken from its line, and leased later": (
        RunBuilder().push().stored().wrote(f"LPOP|{P}ready:0|1").wrote(f"HSET|{P}leased:w|{BARE}|8193").run().done(), {"audit findings"},
    ),
    "an entry too many": (clean().wrote(f"RPUSH|{P}ready:0|{BARE}"), {"audit findings"}),
    "confirmed by a replica, and gone": (RunBuilder().push(wait_replicas=1), {"confirmed lost"}),
    "its child never came": (clean_parent(), {"lost"}),
    "two children of one name": (
        clean_parent().run(id_="default:a", token="1.1.0/0").run(id_="default:b", token="1.1.0/0").child("a").child("b"),
        {"spawned twice"},
    ),
    "a child of one that failed": (
        RunBuilder().push(spawns=1).run(id_="default:a", token="1.1.0/0").child("a").stored().leased().run("failed").wrote(
            f"HDEL|{P}leased:w|{BARE}", f"ZADD|{P}due|5|{BARE}").leave("due"), {"unexpected", "stuck"},
    ),
    "three at a time where two may": (together("slots", [["pair", 2]], 3), {"limit violations"}),
    "two of a group at a time": (together("group", "g", 2), {"limit violations"}),
    "six in a window of five": (together("rates", [["paced", 5, 4.0, 1]], 6), {"limit violations"}),
    "too much in a window by its cost": (together("rates", [["paced", 5, 4.0, 3]], 2), {"limit violations"}),
    "a job of a group before the one in front": (in_order(2, 1), {"order violations"}),
    "the latest call of a key did not run": (
        clean().push("1.1.1", "default:a", covers="k").child("a").run(id_="default:a", token="1.1.1").later().push(
            "1.1.2", "default:b", covers="k"), {"lost"},
    ),
    "a copy of two": (clean().push("1.1.1", "default:a", copies=2).child("a").run(id_="default:a", token="1.1.1"), {"lost"}),
    "a copy too many": (
        clean().push("1.1.1", "default:a", copies=1).child("a").child("b").run(id_="default:a", token="1.1.1").run(
            id_="default:b", token="1.1.1"), {"stored twice"},
    ),
    "in a group, and in line": (
        RunBuilder().push().stored().wrote(f"RPUSH|{P}group:0:ga|{BARE}").wrote(f"LPOP|{P}ready:0|1").wrote(
            f"LPOP|{P}group:0:ga|1", f"HSET|{P}leased:w|{BARE}|8193").run().done(), {"audit findings"},
    ),
    "more than the queue takes": (
        clean().wrote(*[f"HSET|chaos:{{narrow}}:jobs|{n}|{ENVELOPE}" for n in range(41)], *[
            f"RPUSH|chaos:{{narrow}}:ready:0|{n}" for n in range(41)]), {"audit findings"},
    ),
    "before it was due": (clean().push("1.1.1", "default:d", delay=5.0).stored("d").leased(bare="d").run(
        id_="default:d", token="1.1.1").done(bare="d"), {"started early"}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_is_found(name: str) -> None:
    """A history with one thing wrong fails for that, and for nothing else."""
    builder, expected = WRONG[name]

    assert set(builder.checked().failed) == expected


def telling() -> RunBuilder:
    """Build a run of a job that fails once and tells something in both of its attempts, of a reader of it, and of a schedule."""
    builder = RunBuilder().push(kind="told").stored().leased().run("failed")
    builder.runs[-1]["why"] = "RuntimeError"
    builder.wrote(f"HDEL|{P}leased:w|{BARE}", f"RPUSH|{P}ready:0|{BARE}").leased().run(attempt=2).done(attempt=2, pid=7)
    for attempt in (1, 2):
        facts = {"id": ID, "attempt": attempt, "pid": 7}
        found = 2 * (attempt - 1)
        builder.told.append({"phase": "found", "mark": found, **facts})
        builder.told += [{"phase": "told", "number": n, "mark": found + n, **facts} for n in (1, 2)]
        builder.reads += [
            {"phase": "part", "id": ID, "part": f"{attempt}-{n}", "attempt": attempt, "value": [attempt, n]}
            for n in (1, 2)
        ]
    builder.reads.append({"phase": "part end", "id": ID})
    for update in ("1-ready", "1-leased", "2-scheduled", "2-leased", "2-done"):
        attempt, state = update.split("-")
        kind = "JobEnded" if state == "done" else "StateChanged"
        builder.reads.append(
            {"phase": "update", "id": ID, "update": update, "kind": kind, "state": state, "attempt": int(attempt)}
        )
    builder.reads += [{"phase": "update end", "id": ID}, {"phase": "progress", "id": ID, "text": "2/2"}]
    for phase, due, skipped in (("put", 5000, 0), ("stood", 9000, 4)):
        builder.reads.append({"phase": phase, "schedule": "s", "due": due, "fired": 0, "skipped": skipped, "skips": []})
    return builder


TOLD_WRONG: dict[str, tuple[int, dict[str, Any] | None, str]] = {
    "a part is missing": (1, None, "stream violations"),
    "the last part of the end is missing": (3, None, "stream violations"),
    "a part that is another": (2, {"value": [1, 2]}, "stream violations"),
    "a stream without an end": (4, None, "stream violations"),
    "a start is missing": (6, None, "update violations"),
    "a start is told again": (7, {"update": "1-leased", "state": "leased", "attempt": 1}, "update violations"),
    "no end is told": (9, {"update": "2-ready", "kind": "StateChanged", "state": "ready"}, "update violations"),
    "an older progress": (11, {"text": "2/1"}, "progress violations"),
    "an instant that nobody counts": (13, {"skipped": 3}, "tick violations"),
    "an instant that was fired, and no job": (13, {"fired": 1}, "tick violations"),
}


@pytest.mark.parametrize("name", TOLD_WRONG)
def test_what_a_reader_was_not_told_is_found(name: str) -> None:
    """One line less or another in what the reader wrote down fails for that; all of them together are right."""
    at, change, expected = TOLD_WRONG[name]
    builder = telling()
    assert builder.checked().failed == []
    if change is None:
        del builder.reads[at]
    else:
        builder.reads[at].update(change)

    assert builder.checked().failed == [expected]


def test_notes_that_are_lost_are_found() -> None:
    """The attempt after one that failed finds its notes; after one that was taken from its worker it may find older ones."""
    builder = telling()
    builder.told[3]["mark"] = 0
    assert builder.checked().failed == ["note violations"]
    builder.told[3]["mark"] = 7
    assert builder.checked().failed == ["note violations"]


def test_what_is_left_is_stuck_or_leaked() -> None:
    """A job that has not ended after the drain is stuck, and a key that nothing will ever remove is leaked."""
    builder = RunBuilder().push().stored().leased().run("")
    builder.dump.live[ID] = "nowhere"
    builder.dump.leaked.append(f"{P}unique:k:x")

    result = builder.checked()
    assert result.failed == ["stuck", "leaked keys"]
    assert result.counts["lost"] == 0


def test_what_runs_after_its_cancellation_is_found() -> None:
    """A job cancelled before it was due must never start."""
    builder = RunBuilder().push(delay=5.0)
    builder.calls.append({"call": "c", "phase": "cancel", "id": ID, "at": builder.now})
    builder.calls.append({"call": "c", "phase": "cancelled", "id": ID, "gone": True, "at": builder.now})
    cancelled = f'SET|{P}result:{BARE}|{{"status":"cancelled"}}|PX|9'
    builder.stored().wrote(f"LPOP|{P}ready:0|1", f"HDEL|{P}jobs|{BARE}", cancelled)
    assert builder.checked().failed == []

    assert builder.later(6).run().checked().failed == ["ran after cancel"]


def test_poison_may_start_so_often_and_no_oftener() -> None:
    """Three starts of a poison job are its due, the fourth is wrong; and who is dead for crashes must have been there."""
    builder = RunBuilder().push(kind="poison").stored()
    for attempt in (1, 2, 3):
        builder.leased(f"w{attempt}").run("", attempt=attempt, pid=attempt).reaped(f"w{attempt}")
    builder.leased().wrote(f"HDEL|{P}leased:w|{BARE}", f"ZADD|{P}dead|5|{BARE}")
    builder.dump.dead[ID] = '3 0 3\n{"type":"crashed"}'
    assert builder.checked().failed == []
    assert builder.checked().counts["dead"] == 1

    assert builder.run("", attempt=4, pid=4).checked().failed == ["poison started too often"]


def test_an_unknown_push_may_or_may_not_have_happened() -> None:
    """A push without an answer counts as recovered when the job ran, and as no loss when it did not."""
    absent = clean().push("1.1.1", "default:u", ends="unknown")
    present = clean().push("1.1.1", ends="unknown").stored("u").leased(bare="u").run(id_="default:u", token="1.1.1")

    assert (absent.checked().failed, absent.checked().counts["unknown"]) == ([], 1)
    result = present.done(bare="u").checked()
    assert (result.failed, result.counts["recovered"]) == ([], 1)


def test_a_repeat_without_a_reason_is_counted() -> None:
    """A job taken from a worker that met no fault is no loss, and yet a lease taken from the living."""
    builder = RunBuilder().push().stored().leased("w").run()
    builder.runs[-1]["at"] += 5
    builder.wrote(f'HSET|{P}leased:w|\tabout|{{"pid":7}}')
    builder.reaped().leased("v").run(attempt=2, pid=8).done("v", attempt=2, pid=8)

    assert builder.checked().counts["unexplained repeats"] == 1
    assert builder.checked().counts["false reaps"] == 1
    assert builder.checked(also=("unexplained repeats",)).failed == ["unexplained repeats"]


def test_the_append_only_file_is_read_by_transactions() -> None:
    """Effects of one script belong together, however the file is cut into chunks."""

    def packed(*parts: str) -> bytes:
        return f"*{len(parts)}\r\n".encode() + b"".join(f"${len(p)}\r\n{p}\r\n".encode() for p in parts)

    file = (
        packed("SELECT", "0") + packed("MULTI") + packed("SET", "a", "1") + packed("DEL", "b") + packed("EXEC")
        + packed("SET", "c", "2")
    )  # fmt: skip
    found = list(transactions(file[at : at + 5] for at in range(0, len(file), 5)))

    assert found == [[[b"SELECT", b"0"]], [[b"SET", b"a", b"1"], [b"DEL", b"b"]], [[b"SET", b"c", b"2"]]]


def test_spreads_are_what_they_say() -> None:
    """The median, the 99th percentile and the longest of a hundred times."""
    assert spread([]) == {"count": 0}
    assert spread([i / 100 for i in range(1, 101)]) == {"count": 100, "p50": 0.5, "p99": 0.99, "max": 1.0}


def test_every_line_of_the_table_is_explained() -> None:
    """A run prints the lines that chaos/README.md explains and no others, and those that must be zero are bold there."""
    text = (
        (Path(__file__).parents[2] / "chaos" / "README.md")
        .read_text()
        .partition("## The table")[2]
        .partition("\n## ")[0]
    )
    cells = " ".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| "))
    bold = set(re.findall(r"\*\*([^*]+)\*\*", cells))

    assert bold == set(MUST_BE_ZERO)
    assert set(clean().checked().counts) <= set(ROWS)
    assert [row for row in ROWS if row.partition(",")[0] not in cells] == []


def test_what_is_left_is_audited(redis: Any) -> None:
    """A job in two places, an entry without a job, an orphaned state or lease, a wrong count: each is reported."""
    pipe = redis.pipeline()
    pipe.hset(f"{P}jobs", mapping={"twice": ENVELOPE, "held": ENVELOPE, "fine": ENVELOPE, "gone": "x" + ENVELOPE})
    pipe.rpush(f"{P}ready:0", "twice", "fine", "gone", "nobody").zadd(f"{P}due", {"twice": 5})
    pipe.hset(f"{P}state", "ghost", "1 0 0").hset(f"{P}leased:w", mapping={"held": "8193", "\tturn": "1"}).execute()

    dump = take(redis)
    redis.delete(*redis.keys("chaos:*"))

    assert sorted(dump.findings) == [
        f"{P}leased:w holds jobs and is not registered",
        "default: 1 cancelled jobs in line, and 0 are counted",
        "default: a state of nobody, b'ghost'",
        "default:nobody is ready, and no job",
        "default:twice is ready and due",
    ]
    assert dump.live == {"default:twice": "ready and due", "default:held": "leased", "default:fine": "ready"}


def test_a_line_torn_by_a_kill_is_left_out(tmp_path: Path) -> None:
    """A writer that was killed amid a line takes no other line with it: not the one before, not the one another wrote after."""
    whole, torn, after = RunLog(tmp_path / "calls"), RunLog(tmp_path / "calls"), RunLog(tmp_path / "calls")
    whole.write(call="1")
    before = (tmp_path / "calls").stat().st_size
    torn.write(call="2")
    with (tmp_path / "calls").open("rb+") as file:
        file.truncate(before + 12)
    after.write(call="3")

    assert [line["call"] for line in read(tmp_path / "calls")] == ["1", "3"]
