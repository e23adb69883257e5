"""Run the scenarios and write the report: `python -m benchmarks [--quick] [--only NAME] [--kills N]`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import redis

from benchmarks import drain, import_time, plain_list_baseline, producer_scenarios, report, worker_crash
from benchmarks.harness import Bench, running_server

# Name → what is run, and the scenarios whose figures it is compared with.
SCENARIOS: dict[str, tuple[Callable[[Bench], None], tuple[str, ...]]] = {
    "raw-list": (plain_list_baseline.raw_list, ()),
    "raw-limit": (plain_list_baseline.raw_limit, ()),
    "raw-latency": (plain_list_baseline.raw_latency, ()),
    "raw-memory": (plain_list_baseline.raw_memory, ()),
    "enqueue": (producer_scenarios.enqueue, ("raw-list", "raw-limit")),
    "drain": (drain.drain, ("raw-list", "raw-limit")),
    "levelled": (drain.levelled, ()),
    "latency": (producer_scenarios.latency, ("raw-latency",)),
    "queues": (producer_scenarios.many_queues, ()),
    "partitions": (drain.partitions, ()),
    "memory": (producer_scenarios.memory, ("raw-memory",)),
    "idle": (producer_scenarios.idle, ()),
    "depth": (drain.depth, ()),
    "crash": (worker_crash.crash, ()),
    "import": (import_time.import_time, ()),
}
# Measured again after these, since a machine is not equally fast all the time; the median of all rounds counts.
AGAIN = ("enqueue", "drain")


def main() -> int:
    """
    Return 1 when a scenario failed.

    A missed goal is printed and no failure: timings are those of the machine and its hour.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=SCENARIOS, help="run this scenario and its baselines; repeatable"
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the work: for a look, not for a figure")
    parser.add_argument("--kills", type=int, default=50, help="how often a worker process is killed (default 50)")
    parser.add_argument("--output", type=Path, help="folder for report.md and report.svg (default: this package's)")
    options = parser.parse_args()
    chosen = set(options.only or SCENARIOS)
    chosen |= {needed for name in chosen for needed in SCENARIOS[name][1]}
    output = options.output or Path(__file__).parent

    begin, failed = time.monotonic(), []
    with running_server() as (url, pid), tempfile.TemporaryDirectory(prefix="bench") as directory:
        os.environ["CONVEYOR_URL"] = url  # before benchmarks.measured_jobs is imported
        bench = Bench(url, pid, options.quick, options.kills, Path(directory) / "record")
        for name, (scenario, _) in SCENARIOS.items():
            if name not in chosen:
                continue
            if not _run(name, scenario, bench):
                failed.append(name)
            if name in AGAIN:
                for baseline_name in SCENARIOS[name][1]:
                    _run(baseline_name, SCENARIOS[baseline_name][0], bench)
        with bench.client() as client:
            info = client.info("server")
    about = report.machine(info.get("valkey_version", info["redis_version"]), redis.__version__)
    missed = report.write(bench.figures, output, about + (", quick" if options.quick else ""))
    print(f"\n{output / 'report.md'} written after {time.monotonic() - begin:.0f} s")
    for goal in missed:
        print(f"missed: {goal.title}: {report.number(goal.value(bench.figures))}, goal {goal.text()}")
    for name in failed:
        print(f"failed: {name}")
    return 1 if failed else 0


def _run(name: str, scenario: Callable[[Bench], None], bench: Bench) -> bool:
    print(name, flush=True)
    try:
        scenario(bench)
    except Exception as error:  # the others can still be measured
        print(f"  failed: {type(error).__name__}: {error}", flush=True)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
