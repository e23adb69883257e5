"""``python -m chaos --minutes 2 --seed 1`` breaks things and counts; exit 1 when something was lost or happened twice."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
from pathlib import Path

from chaos import report, single_fault_runs
from chaos.fault_injector import schedule
from chaos.soak import soak


def main() -> int:
    """Run, print the table, write the report."""
    parser = argparse.ArgumentParser(prog="chaos", description="Break things under load, and count what was lost.")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--topology", choices=("standalone", "cluster", "sentinel"), default="standalone")
    parser.add_argument(
        "--roles", action="store_true", help="programs log in with the rights that `conveyor acl` prints"
    )
    parser.add_argument("--server", help="valkey, redis6, redis7, redis8, or the path of a binary (default: valkey)")
    parser.add_argument("--report", type=Path, help="write the counts as JSON")
    parser.add_argument(
        "--scenario", choices=sorted(single_fault_runs.SCENARIOS), help="one fault, many times, instead of all"
    )
    parser.add_argument("--count", type=int, help="how often (default: as in docs/reliability.md)")
    parser.add_argument("--schedule", action="store_true", help="print what would happen when, and no more")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends with us
    print(f"seed {options.seed}", flush=True)
    faults = schedule(options.seed, 60 * options.minutes, topology=options.topology)
    if not options.scenario:
        print("\n".join(map(str, faults)), flush=True)
    if options.schedule:
        return 0
    if options.server:
        os.environ["CHAOS_SERVER"] = options.server
    if options.scenario:
        result, environment, facts = single_fault_runs.run(options.scenario, options.count, options.seed)
    else:
        result, environment, facts = soak(
            60 * options.minutes, options.seed, faults, topology=options.topology, roles=options.roles
        )
    print(report.table(result, environment.faults, facts))
    if options.report:
        report.write(options.report, result, environment.faults, facts)
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
