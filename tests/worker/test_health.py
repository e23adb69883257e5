"""The health endpoints of a worker."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from conveyor import Conveyor
from conveyor.errors import ConfigurationError
from conveyor.worker.supervision.health import STANDS, ChildFacts, WorkerFacts, bind, not_live, not_ready
from support.shell import Shell
from support.waiting import until

APP = """
from conveyor import Conveyor
app = Conveyor(lease="1s")
@app.task
def send() -> None: ...
"""


def child(turned: float | None, *, takes: bool = True, lease: float = 15.0) -> ChildFacts:
    return ChildFacts(1, 42, 0.1, turned, lease, takes, None)


@pytest.mark.parametrize(
    ("state", "passed", "children", "live", "why"),
    [
        ("running", 0.1, [child(3.0)], True, ""),
        ("running", 0.1, [child(9.0), child(1.0)], True, ""),
        ("running", 0.1, [child(9.0), child(1.0, takes=False)], True, "no turn for 9.0 s"),
        ("running", 0.1, [child(None)], True, "no process has registered"),
        ("running", 0.1, [], True, "no process is up"),
        ("stopping", 0.1, [child(1.0)], True, "it is stopping"),
        ("quiet", 0.1, [child(1.0)], True, "it is quiet"),
        ("running", STANDS + 1, [child(1.0)], False, "stood still"),
    ],
)
def test_a_worker_is_ready_while_one_process_makes_turns(
    state: str, passed: float, children: list[ChildFacts], live: bool, why: str
) -> None:
    """Ready is what takes jobs; live is what a restart would not mend."""
    facts = WorkerFacts("shop:app", "1", state, passed, children)

    assert (not_live(facts) == "") is live
    assert why in not_ready(facts)
    assert (not_ready(facts) == "") is (why == "")


def test_a_port_that_is_none_or_taken_is_refused() -> None:
    """Nothing starts before its port is there."""
    with bind("127.0.0.1:0") as taken:
        port = taken.getsockname()[1]
        for address in ("http", "99999", f"127.0.0.1:{port}"):
            with pytest.raises(ConfigurationError, match="health"):
                bind(address)


def fetch(url: str) -> tuple[int, str]:
    """Return the status and the body."""
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_worker_tells_whether_it_takes_jobs(url: str, tmp_path: Path) -> None:
    """It is ready when it has registered, not ready while its process stands still, live all the time."""
    shell = Shell(tmp_path, url)
    shell.write("shop.py", APP)
    worker = shell.start("worker", "shop:app", "--health-port", "127.0.0.1:0")
    try:
        assert worker.stderr is not None
        line = next(line for line in worker.stderr if "health" in line)
        base = re.findall(r"http://\S+", line)[0]

        until(lambda: fetch(base + "readyz")[0] == 200)
        assert fetch(base + "livez") == (200, "ok\n")
        document = json.loads(fetch(base)[1])
        assert (document["schema"], document["ready"], document["app"]) == (
            "conveyor/worker-health@1",
            True,
            "shop:app",
        )
        (process,) = document["processes"]
        status, text = fetch(base + "nothing")
        assert (status, text) == (404, "There are /livez, /readyz, /health, /metrics, /load.\n")
        assert fetch(base + "metrics")[0] == 200
        with Conveyor(url) as app:
            app.queue("post").push_many([1, 2, 3])
            app.queue("quiet").push(1, delay="1h")
            loads = [
                json.loads(fetch(f"{base}load{query}")[1]) for query in ("", "?queue=post", "?queue=post&queue=quiet")
            ]
            assert [one["total"]["load"] for one in loads] == [3, 3, 3]
            assert [sorted(one["queues"]) for one in loads[1:]] == [["post"], ["post", "quiet"]]
            status, text = fetch(base + "load?queue=nobody")
            assert status == 404
            assert "'nobody'" in text
            for name in ("post", "quiet"):
                app.queue(name).purge()

        os.kill(process["pid"], signal.SIGSTOP)
        until(lambda: fetch(base + "readyz")[0] == 503)
        assert "no turn for" in fetch(base + "readyz")[1]
        assert fetch(base + "livez")[0] == 200
        os.kill(process["pid"], signal.SIGCONT)
        until(lambda: fetch(base + "readyz")[0] == 200)
    finally:
        worker.send_signal(signal.SIGTERM)
        assert _end(worker) == 0


def _end(worker: subprocess.Popen[str]) -> int:
    worker.communicate(timeout=60)
    return worker.returncode
