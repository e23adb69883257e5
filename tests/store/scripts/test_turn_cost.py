"""The fixed cost of a turn of one plain job, which every idle worker pays twice between an enqueue and its result."""

from __future__ import annotations

import pytest

from conveyor.store import operations
from conveyor.store.operations import TurnReport
from support.script_faults import break_script
from support.seeded_queue import SeededQueue


def commands(seeded: SeededQueue) -> int:
    """Return how many commands ran since the counters were set to 0, those inside scripts too."""
    used = {name: stats["calls"] for name, stats in seeded.redis.info("commandstats").items()}
    return sum(used.values()) - sum(
        used.get(f"cmdstat_{one}", 0) for one in ("evalsha", "info", "config", "config|resetstat")
    )


def report_of(*ids: str, record: bytes = b"") -> TurnReport:
    """Return the report of jobs that ended well, with the counters that a worker sends; a *record* is their result."""
    report = TurnReport(list(ids))
    if record:
        report.results = dict.fromkeys(ids, (600_000, record))
    report.stats = dict.fromkeys(("done:t", "ms:t", "le0:t", "at0:t", "wait:queue:t"), 1)
    report.recent = [f"{id_}\tt\tdone\t1\t1".encode() for id_ in ids]
    return report


@pytest.mark.standalone_only("counts every command the server gets, those of a replica and of sentinels too")
@pytest.mark.leaves_keys("counters and the list of finished jobs")
def test_the_commands_of_one_plain_job(seeded: SeededQueue) -> None:
    """
    A turn that leases one plain job runs 16 commands, and the one that reports its end 26, with a result that somebody waits for.

    They were 19 and 37.
    """
    seeded.register("w")
    costs = []
    for number, id_ in ((1, "a"), (3, "b"), (5, "c"), (7, "d")):
        seeded.push(id_)
        seeded.redis.config_resetstat()
        assert seeded.turn("w", number, 8).ids == [id_]
        leasing = commands(seeded)
        seeded.run(operations.await_result(seeded.keys, id_, "c:replies:x"))
        seeded.redis.config_resetstat()
        assert seeded.turn("w", number + 1, report=report_of(id_, record=b"{}"), flags="e").held == 0
        costs.append((leasing, commands(seeded)))

    assert min(costs) == (16, 26)  # the first end of a minute costs more


@pytest.mark.leaves_keys("counters and the list of finished jobs")
def test_a_plain_job_makes_no_lazy_function(seeded: SeededQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leasing, settling and announcing plain jobs asks for no function of a lazy part; a job with marks does."""
    break_script(monkeypatch, operations, "TURN", "function lazy()\n", "function lazy()\nerror('made')\n")
    seeded.register("w")
    seeded.push("a", "b")
    assert seeded.turn("w", 1, 1).ids == ["a"]
    seeded.run(operations.await_result(seeded.keys, "a", "c:replies:x"))
    assert seeded.turn("w", 2, 1, report=report_of("a", record=b"{}"), flags="e").ids == ["b"]
    assert seeded.turn("w", 3, report=report_of("b"), flags="e").held == 0

    seeded.push(operations.Entry("c", b"e9999999999999\nt\n{}"))
    with pytest.raises(Exception, match="made"):
        seeded.turn("w", 4, 1)
