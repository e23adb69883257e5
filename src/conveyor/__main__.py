"""The command line as `conveyor` and as `python -m conveyor`."""

from __future__ import annotations

import sys


def run() -> int:
    """Run the command line; return its exit code. Ctrl-C ends it calmly from here on: most of a short command is its imports."""
    try:
        from conveyor.cli import main

        return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(run())
