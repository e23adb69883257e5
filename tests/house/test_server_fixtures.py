"""The servers and the leak check that every other test leans on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

import pytest
import redis as redis_py

from support import server_kinds
from support.leaked_keys import leaked
from support.waiting import until_said
from testbed.server_process import Server, find_binary


@pytest.mark.redis6
@pytest.mark.redis7
@pytest.mark.standalone_only("with --on there is one server for all", on=())
def test_marked_test_runs_on_the_server_it_names(request: pytest.FixtureRequest, server: Server) -> None:
    """A test marked for an older server runs on Valkey and on that server, and on no other."""
    expected = {"valkey": (7,), "redis6": (6, 2), "redis7": (7,)}[request.node.callspec.params["server"]]

    with server.client() as client:
        info = client.info("server")
    version = tuple(int(part) for part in str(info["redis_version"]).split("."))

    assert version[: len(expected)] == expected
    assert ("valkey_version" in info) == (request.node.callspec.params["server"] == "valkey")


@pytest.mark.standalone_only("looks for binaries", on=("valkey",))
def test_a_place_is_a_name_or_a_binary() -> None:
    """`--on` and `PLACES` take the path of any server; what it is is asked of it, so that tests know what it can show."""
    for name in ("valkey", *server_kinds.OTHERS):
        binary = find_binary(name)
        assert server_kinds.kind(name) == name
        assert binary is None or server_kinds.kind(str(binary)) == name
    assert server_kinds.checked_place("/opt/redis/redis-server") == "/opt/redis/redis-server"
    assert server_kinds.missing("/nowhere/redis-server") == "/nowhere/redis-server: this server is not installed"
    with pytest.raises(ArgumentTypeError, match="'redis5' is none of valkey, redis6"):
        server_kinds.checked_place("redis5")


def test_server_keeps_nothing_on_disk(redis: redis_py.Redis) -> None:
    """The shared server has persistence off, so tests measure and crash without a disk."""
    assert redis.config_get("save")["save"] == ""
    assert redis.config_get("appendonly")["appendonly"] == "no"


@pytest.mark.row("I19")
@pytest.mark.leaves_keys("it shows that the keys are found")
def test_keys_that_never_expire_are_leaks(redis: redis_py.Redis) -> None:
    """Keys without a TTL are leaks, save the constant ones; a counter of a minute needs a TTL too."""
    redis.set("conveyor:{q}:result:1", "x", ex=60)
    redis.sadd("conveyor:queues", "q")
    redis.hset("conveyor:{q}:conf", "paused", "0")
    redis.lpush("conveyor:{q}:recent", "1")
    redis.hset("conveyor:{q}:jobs", "1", "x")
    redis.hset("conveyor:{q}:stats:29001", "done", "1")

    assert leaked(redis) == ["conveyor:{q}:jobs", "conveyor:{q}:stats:29001"]


@pytest.mark.row("I19")
def test_leaking_test_fails(pytester: pytest.Pytester) -> None:
    """A test that passes and leaves a key behind is reported as an error; one that says why is not."""
    use_our_conftest(pytester)
    pytester.makepyfile(
        """
        import pytest

        def test_leaks(redis): redis.set("forgotten", 1)
        def test_is_tidy(redis): redis.set("short", 1, ex=60)
        @pytest.mark.leaves_keys("on purpose")
        def test_says_so(redis): redis.set("meant", 1)
        """
    )

    result = pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider")

    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(["*left 1 keys without a TTL behind*", "*forgotten*"])


def use_our_conftest(pytester: pytest.Pytester) -> None:
    home = Path(__file__).parents[2]
    pytester.makeconftest((home / "tests" / "conftest.py").read_text())
    pytester.makeini(
        f"[pytest]\npythonpath = {home} {home / 'tests'}\nasyncio_default_fixture_loop_scope = function\n"
        "markers =\n  leaves_keys(reason): x\n  redis6: x\n  redis7: x\n"
    )


@pytest.mark.parametrize("fails", [False, True])
def test_no_part_of_a_test_hangs(pytester: pytest.Pytester, fails: bool) -> None:
    """The process of a test whose fixture never ends is ended with a stack, also where the test itself had failed."""
    use_our_conftest(pytester)
    pytester.makepyfile(
        f"""
        import threading
        import pytest

        @pytest.fixture
        def endless():
            yield
            threading.Event().wait()

        def test_waits(endless): assert {not fails}
        """
    )

    result = pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=1", timeout=60)

    assert result.ret == 1
    result.stderr.fnmatch_lines(["Timeout*", "*in endless*"])


def test_server_dies_with_its_test_process(directory: Path) -> None:
    """A server is gone soon after the process that started it was killed with SIGKILL."""
    program = (
        f"import sys, time; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from pathlib import Path; from testbed.server_process import Server, find_binary\n"
        f"print(Server(find_binary('valkey'), Path({str(directory / 'orphan')!r})).pid, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid = int(until_said(owner))
    os.kill(pid, 0)

    owner.kill()
    owner.wait(60)
    owner.stdout.close()

    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and _state(pid) != "Z":
        assert time.monotonic() < deadline, "the server outlived its owner"
        time.sleep(0.01)


def test_killed_server_starts_again_with_its_data(start_server: Callable[..., Server]) -> None:
    """A server with an append-only file that was killed comes back on the same socket with what it had acknowledged."""
    server = start_server("--appendonly", "yes", "--appendfsync", "always")
    with server.client() as client:
        client.set("kept", "1")

    os.kill(server.pid, signal.SIGKILL)
    server.kill()
    server.start()

    with server.client() as client:
        assert client.get("kept") == b"1"


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
