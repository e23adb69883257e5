"""
The workers of the demo: ``python -m conveyor.cli.demo.worker_processes PROCESSES``.

Like `conveyor worker`, but its standard input is a pipe that the demo holds. When that ends, however the demo ended,
the workers drain and stop.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from conveyor.worker.supervision import supervisor

APP = "conveyor.cli.demo.task:app"
GRACE_SECONDS = 5.0


def _stop_at_end_of_input() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_stop_at_end_of_input, name="conveyor-demo-life", daemon=True).start()
    sys.exit(
        supervisor.run(
            APP, queues={}, concurrency=20, threads=4, processes=int(sys.argv[1]), burst=False, grace=GRACE_SECONDS
        )
    )
