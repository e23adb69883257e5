"""Runs the suite on one place after the other (`--on`), and prints a line for each; `make test-matrix` calls it."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HOME = Path(__file__).parents[2]
sys.path[:0] = [str(HOME), str(HOME / "tests"), str(HOME / "src")]

from support.server_kinds import PLACES, missing  # noqa: E402

WIDTH = max(map(len, PLACES))


def run(place: str, arguments: list[str], log: Path) -> bool:
    """Run pytest on *place*; print how it ended, and all it said when that was not well."""
    if why := missing(place):
        print(f"{place:{WIDTH}}  skipped: {why}", flush=True)
        return True
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--on", place, *arguments]
    with log.open("w") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    text = log.read_text()
    last = text.strip().splitlines()[-1].strip("= ") if text.strip() else "nothing was said"
    print(f"{place:{WIDTH}}  {last}  ({time.monotonic() - began:.0f} s)", flush=True)
    if code != 0:
        print(text, flush=True)
    return code == 0


def main() -> int:
    """Parse the places and the arguments for pytest; return 1 when a place failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--places", default=" ".join(PLACES), help="which, separated by spaces: names, or paths of binaries"
    )
    parser.add_argument("--at-once", type=int, default=1, help="how many at the same time")
    options, arguments = parser.parse_known_args()
    places = options.places.split()
    if unknown := {place for place in places if "/" not in place} - set(PLACES):
        parser.error(f"unknown places: {', '.join(sorted(unknown))}. Known: {', '.join(PLACES)}, and paths of binaries")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.at_once) as pool:
        ended = list(pool.map(lambda place: run(place, arguments, Path(folder, place.replace("/", "_"))), places))
    return 0 if all(ended) else 1


if __name__ == "__main__":
    sys.exit(main())
