"""Secrets that must never be seen: a password in a URL and the keys of payloads, through all that is printed."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conveyor.cli import COMMANDS, main
from conveyor.jobs.app import Conveyor
from conveyor.messaging.retry import Retry
from support.running_worker import drain
from support.shell import Shell
from support.waiting import until
from testbed.server_groups import free_port
from testbed.server_process import Server

PASSWORD = "canary-of-the-url-9f1c"
SECRET = "canary-of-the-keys-7d42-and-more"
PAYLOAD = "canary-of-a-payload-51aa"
CANARIES = (PASSWORD, SECRET, PAYLOAD)

JOBS = """
import os
from conveyor import Conveyor

app = Conveyor(keys={"2026-11": os.environ["SECRET"]}, encrypt=True)


@app.task(retry=1)
def fail(word: str) -> None:
    raise ValueError("as it should")
"""


@pytest.fixture
def guarded(start_server: Callable[..., Server]) -> str:
    """The URL, with a password, of a server on TCP."""
    port = free_port()
    server = start_server("--bind", "127.0.0.1", "--port", str(port))
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "ada", "on", f">{PASSWORD}", "~*", "&*", "+@all")
    return f"redis://ada:{PASSWORD}@127.0.0.1:{port}/0"


def sightings(text: str) -> list[str]:
    """Return the lines of *text* in which a secret stands."""
    return [line for line in text.splitlines() if any(canary in line for canary in CANARIES)]


def raised(call: Callable[[], Any]) -> str:
    """Return all that is shown of what *call* raises, which it must."""
    try:
        call()
    except Exception as error:
        # The lines of this file hold no secret, since they name constants.
        return "".join(traceback.format_exception(error)) + repr(error) + str(error)
    raise AssertionError("nothing was raised")


@pytest.mark.row("I22")
def test_what_is_printed_of_objects(guarded):
    """No repr and no str of an app and of its parts has a secret, and keys are not pickled."""
    app = Conveyor(guarded, keys={"2026-11": SECRET, "b": SECRET.encode()}, encrypt=True)
    queue = app.queue("mail")
    place = app.client.endpoint(queue.keys) if hasattr(app.client, "endpoint") else app.client.address
    things = [
        app,
        app.client,
        app.client.address,
        place,
        app.sealing,
        app.sealing.sealer,
        app.sealing.sealer.keyring,
        queue,
    ]
    shown = "\n".join(
        f"{thing!r}\n{thing}\n{vars(thing) if hasattr(thing, '__dict__') and thing is app else ''}" for thing in things
    )
    assert "2026-11" in shown
    assert sightings(shown) == []
    assert sightings(raised(lambda: pickle.dumps(app.sealing.sealer.keyring))) == []
    app.close()


@pytest.mark.row("I22")
def test_what_is_said_of_mistakes(guarded):
    """Wrong keys and wrong URLs are refused without being repeated."""
    wrong: list[Callable[[], Any]] = [
        lambda: Conveyor(guarded, keys={SECRET + " ": "id"}),
        lambda: Conveyor(guarded, keys={"id": SECRET[:5]}),
        lambda: Conveyor(guarded, keys={"id": [SECRET]}),  # type: ignore[dict-item]
        lambda: Conveyor(guarded, keys={"id": SECRET + "\ud800"}),
        lambda: Conveyor(guarded, keys=[("id", SECRET)]),  # type: ignore[arg-type]
    ]
    for scheme in ("http", "redis+nothing", "redis+sentinel", "redis+cluster", "embedded"):
        for rest in ("h:1/x/y/z", "h:port/0", "", "h1:1,h2:/0?x=%"):
            url = f"{scheme}://ada:{PASSWORD}@{rest}"
            wrong.append(lambda url=url: _reach(url))
    wrong += [lambda: _reach(guarded.replace("ada", "bob")), lambda: _reach(f"redis://ada:{PASSWORD}@127.0.0.1:1/0")]
    wrong += [
        lambda: _reach(f"redis://127.0.0.1:1/0?password={PASSWORD}"),
        lambda: _reach(f"redis://ada:{PASSWORD}@127.0.0.1:x"),
    ]
    for call in wrong:
        assert sightings(raised(call)) == []


def _reach(url: str) -> None:
    app = Conveyor(url)
    app.client.retry_for = 0.0
    try:
        app.queue("mail").push("x")
        raise RuntimeError("it was reached")
    finally:
        app.close()


@pytest.mark.row("I22")
async def test_what_is_logged(guarded, caplog, capfd):
    """No line of the log at DEBUG, of a worker whose jobs fail and whose keys are wrong, has a secret."""
    caplog.set_level(logging.DEBUG)
    good = Conveyor(guarded, keys={"2026-11": SECRET}, encrypt=True)
    bad = Conveyor(guarded, keys={"2026-11": SECRET[::-1]})
    shown = ""
    for app in (good, bad):

        @app.task(name="fail", retry=Retry(attempts=2, backoff="1ms"))
        async def fail(word: str) -> None:
            raise ValueError("as it should")

    for app in (good, bad):
        job = await good.tasks["fail"].aenqueue(PAYLOAD)
        await drain(app)
        with pytest.raises(Exception, match=r"E40|as it should") as caught:
            await app.job(job.id).aresult("60s")
        shown += repr(caught.value) + "".join(traceback.format_exception(caught.value))
        shown += str([letter async for letter in app.queue("default").adead_letters()])
    for app in (good, bad):
        await app.aclose()
    assert len(caplog.records) >= 3
    output = capfd.readouterr()
    assert sightings(shown + caplog.text + output.out + output.err) == []


@pytest.fixture
def shell(tmp_path: Path, guarded: str) -> Shell:
    found = Shell(tmp_path, guarded)
    found.write("jobs.py", JOBS)
    return found


@pytest.mark.row("I22")
def test_what_the_command_line_shows(shell, monkeypatch, capsys):
    """No command prints a secret, with the app or without, and neither does a worker or the list of processes."""
    run = {"SECRET": SECRET, "CONVEYOR_APP": "jobs:app"}
    job = shell.run("enqueue", "fail", f"word={PAYLOAD}", **run).stdout.strip()
    assert job.startswith("default:")
    pushed = shell.run("push", "mail", f'"{PAYLOAD}"', "--id", "mine", **run)
    assert pushed.stdout == "mine\n"
    texts = [worker_output(shell, run)]
    assert "as it should" in texts[0]
    monkeypatch.chdir(shell.directory)
    monkeypatch.setenv("CONVEYOR_URL", shell.url)

    def typed(*command: str) -> str:
        main(command)
        printed = capsys.readouterr()
        return printed.out + printed.err

    commands = [("job", "list"), ("queue", "list"), ("queue", "show", "default"), ("workers", "list"), ("status",)]
    commands += [
        ("job", "show", job),
        ("job", "show", "mine"),
        *((name,) for name in ("doctor", "config", "acl") if name in COMMANDS),
    ]
    texts += [typed(*command, *options) for command in commands for options in ((), ("--json",), ("-v",))]
    assert "sealed with key 2026-11" in texts[-1] + "".join(texts)
    assert "127.0.0.1" in typed("doctor")
    monkeypatch.setenv("CONVEYOR_URL", shell.url.replace("ada", "bob"))
    texts += [wrong := typed("status", "-v")]
    assert "error" in wrong
    assert [line for text in texts for line in sightings(text)] == []
    assert PAYLOAD in shell.run("job", "show", job, **run).stdout  # who has the keys may see it


def worker_output(shell: Shell, run: dict[str, str]) -> str:
    """Run a supervised worker until the job is dead; return what it printed, and the command lines of its processes."""
    read: list[str] = []
    with shell.start_anew("worker", "--processes", "2", "-v", **run) as worker:
        try:
            reader = threading.Thread(target=lambda: read.extend(iter(worker.stderr.readline, "")), daemon=True)
            reader.start()
            until(lambda: "as it should" in "".join(read), what="the log of the job that died")
            listed = {}
            for entry in Path("/proc").glob("[0-9]*/cmdline"):
                with_parent = _ancestors(int(entry.parent.name))
                if worker.pid in with_parent:
                    listed[entry.parent.name] = entry.read_bytes().replace(b"\0", b" ").decode()
            assert len(listed) >= 3
            worker.terminate()
            worker.wait(60)
        finally:
            worker.kill()
        reader.join(60)
        return "\n".join([*read, worker.stdout.read(), *listed.values()])


def _ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        found.append(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
    return found


def test_cipher_that_is_missing_is_said(tmp_path):
    """Without the package, encrypt=True is refused with how to install it, and signing works."""
    (tmp_path / "cryptography").mkdir()
    (tmp_path / "cryptography" / "__init__.py").write_text("raise ImportError('not here')")
    shell = Shell(tmp_path)
    shell.write("jobs.py", JOBS)
    script = "try:\n    import jobs\nexcept Exception as error:\n    print(type(error).__name__, error)"
    import subprocess
    import sys

    environment = shell.environment(SECRET=SECRET)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=environment | {"PYTHONPATH": os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])},
    )  # fmt: skip
    assert "ConfigurationError Conveyor(encrypt=True) needs the package 'cryptography'" in done.stdout
    assert "pip install 'conveyor[encrypt]'" in done.stdout
    assert sightings(done.stdout + done.stderr) == []


def test_canary_is_found(guarded):
    """A secret that is printed would be seen."""
    assert sightings(f"x\nsee {guarded}\n") == [f"see {guarded}"]
    assert asyncio.run(asyncio.sleep(0, "y")) == "y"
