"""The embedded server, with real processes: users are killed, keepers are killed, servers are killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import redis

from conveyor import Conveyor
from conveyor.errors import ConfigurationError, StoreUnavailable
from conveyor.store.embedded import keeper
from conveyor.store.embedded import server as embedded
from conveyor.store.embedded.server import attach, inspect, stop
from support.forked_children import in_child
from support.supervisor_process import running
from support.waiting import until

SOURCE = Path(embedded.__file__).parents[2]
USER = """
import json, sys, pathlib
from conveyor.store.embedded.server import attach
held = attach(pathlib.Path(sys.argv[1]))
print(json.dumps([held.url, held.pid, held.started]), flush=True)
sys.stdin.read()
"""


def processes(*words):
    found = {}  # command lines by pid of the living processes that name one of *words*
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if any(str(word) in line for word in words):
                    found[int(entry.name)] = line
    return found


class Place:
    """A data directory, the sockets' directory, and the processes that use them."""

    def __init__(self, root, runtime):
        self.directory, self.runtime, self.users = root / "project" / ".conveyor", runtime, []

    def user(self):
        command, environment = (
            [sys.executable, "-c", USER, str(self.directory)],
            {**os.environ, "PYTHONPATH": str(SOURCE)},
        )
        user = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.users.append(user)
        return user

    def record(self):
        return keeper.read_record(str(self.directory))

    def leftovers(self):
        return [*processes(self.directory, self.runtime).values(), *self.runtime.glob("conveyor/*.sock")]

    def close(self):
        for user in self.users:
            user.kill()
            user.communicate()
        stop(self.directory)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A place that must be left without processes and sockets."""
    runtime = Path(tempfile.mkdtemp(prefix="cv-", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.delenv("CONVEYOR_SERVER_BIN", raising=False)
    place = Place(tmp_path.resolve(), runtime)
    yield place
    place.close()
    until(lambda: not place.leftovers(), what="no process or socket is left")
    shutil.rmtree(runtime)


def heard(user):
    too_late = threading.Timer(60, user.kill)
    too_late.start()
    line = user.stdout.readline()  # url, the server's pid, started
    too_late.cancel()
    assert line, "the user ended, or was killed after a minute, before it was attached"
    return json.loads(line)


def client(url):
    return redis.Redis.from_url(url, decode_responses=True)


def test_the_server_lives_from_the_first_attach_to_the_last_close(place):
    """The first attach starts the server, the second finds it, and the last close ends it; closing twice is allowed."""
    first = attach(place.directory)
    second = attach(place.directory)

    assert (first.started, second.started) == (True, False)
    assert first.pid == second.pid
    assert first.version.split()[0] in {"Valkey", "Redis"}
    first.close()
    first.close()
    with client(second.url) as server:
        assert server.ping()
    second.close()
    until(lambda: not place.leftovers(), what="the server stops")


def test_the_server_is_durable_private_and_complete(place):
    """It appends to a file, evicts nothing, debugs nothing, and listens on a socket in a directory of its owner alone."""
    with attach(place.directory) as held, client(held.url) as server:
        settings = {"appendonly": "yes", "appendfsync": "everysec", "port": "0", "maxmemory-policy": "noeviction"}
        settings["enable-debug-command"] = "no"
        found = {name: server.config_get(name)[name] for name in settings}
        path = Path(held.url.removeprefix("unix://"))

        assert found == settings
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert path.stat().st_mode & 0o077 == 0
        assert (place.directory / ".gitignore").read_text() == "*\n"


@pytest.mark.row("D311")
@pytest.mark.parametrize("own", [None, "glibc.malloc.tcache_count=9"])
def test_the_server_keeps_freed_blocks_at_hand(place, monkeypatch, own):
    """The allocator of the server is told to reuse what was freed last, unless the user's own setting, which comes later, says otherwise."""
    if own is None:
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    else:
        monkeypatch.setenv("GLIBC_TUNABLES", own)
    held = attach(place.directory)

    # The C library ends each setting with a zero byte where it stands.
    seen = Path(f"/proc/{held.pid}/environ").read_bytes().decode().replace("\0", ":")
    ours = "GLIBC_TUNABLES=glibc.malloc.tcache_count=4096:"
    assert seen.count("GLIBC_TUNABLES=") == 1
    assert (ours if own is None else f"{ours}{own}:") in seen
    assert own is not None or seen.count("tcache_count") == 1
    held.close()


def test_processes_share_one_server_however_many_begin_at_once(place):
    """Five processes that attach at the same moment get one server, started by one of them."""
    users = [place.user() for _ in range(5)]
    said = [heard(user) for user in users]

    assert len({(url, pid) for url, pid, _ in said}) == 1
    assert sum(started for *_, started in said) == 1
    with attach(place.directory) as held, client(held.url) as server:
        assert server.info("server")["process_id"] == held.pid == said[0][1]


def test_a_killed_user_counts_as_gone(place):
    """When the only user is killed with SIGKILL, the server stops; a newcomer finds what was written."""
    user = place.user()
    url, pid, _ = heard(user)
    with client(url) as server:
        server.set("written", "before")

    user.kill()
    user.wait()
    until(lambda: not running(pid), what="the server stops")
    with attach(place.directory) as held, client(held.url) as server:
        assert held.started
        assert held.pid != pid
        assert server.get("written") == "before"


def test_data_is_found_again_while_starts_and_stops_overlap(place):
    """A newcomer that comes while the server stops waits and finds everything; ten times in a row nothing is lost."""
    for turn in range(10):
        with attach(place.directory) as held, client(held.url) as server:
            assert server.incr("turns") == turn + 1


def test_no_server_outlives_its_keeper(place):
    """A killed keeper takes its server along; the next attach starts both, with the data, on the same socket."""
    with attach(place.directory) as held, client(held.url) as server:
        server.set("written", "before")
        os.kill(place.record()["keeper"], signal.SIGKILL)
        until(lambda: not running(held.pid), what="the server goes with its keeper")
        assert not inspect(place.directory).running

        with attach(place.directory) as again:
            assert again.started
            assert again.url == held.url
            assert server.get("written") == "before"


def test_an_attach_right_after_the_keeper_was_killed_gets_the_new_server(place):
    """While the old server is still going, an attach is not handed to it."""
    with attach(place.directory) as held:
        keeper_pid = place.record()["keeper"]
        os.kill(keeper_pid, signal.SIGKILL)
        until(lambda: not running(keeper_pid), what="the keeper is dead")
        with attach(place.directory) as again, client(again.url) as server:
            assert again.started
            assert again.pid != held.pid
            assert server.info("server")["process_id"] == again.pid


def test_a_crashed_server_comes_back_while_it_has_users(place):
    """A server killed with SIGKILL is started again on the same socket, with its data, as often as it happens."""
    with attach(place.directory) as held, client(held.url) as server:
        server.set("written", "before")
        pid = held.pid
        for _ in range(3):
            os.kill(pid, signal.SIGKILL)
            back = until(
                lambda pid=pid: (s := inspect(place.directory)).running and s.pid != pid and s, what="it is back"
            )
            assert back.url == held.url
            assert server.get("written") == "before"
            pid = back.pid


def test_where_the_kernel_cannot_tie_the_server_a_guard_does(place, tmp_path, monkeypatch):
    """Without a parent-death signal the server goes with a killed keeper all the same, and a normal stop leaves no guard."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys; sys.path.insert(0, {str(Path(keeper.__file__).parent)!r}); import keeper\n"
        "keeper.parent_death_signal = lambda: None\n"
        "keeper.main(sys.argv[1])\n"
    )
    monkeypatch.setattr(embedded, "KEEPER", driver)
    with attach(place.directory) as held:
        guards = processes(f'kill "$0" {held.pid}')
        assert len(guards) == 1
        os.kill(place.record()["keeper"], signal.SIGKILL)
        until(lambda: not running(held.pid), what="the server goes with its keeper")
        until(lambda: not any(map(running, guards)), what="the guard ends")
    with attach(place.directory) as held:
        guards = processes(f'kill "$0" {held.pid}')
        assert len(guards) == 1
    until(lambda: not any(map(running, guards)), what="the guard ends")


def test_the_keeper_stands_apart_from_its_starter(place):
    """The keeper is in no session or process group of the starter, so ctrl-C and a closed terminal pass it by."""
    with attach(place.directory) as held:
        keeper_pid = place.record()["keeper"]

        for pid in (keeper_pid, held.pid):
            assert os.getsid(pid) != os.getsid(0)
            assert os.getpgid(pid) != os.getpgid(0)
        assert "redis" not in (Path("/proc") / str(keeper_pid) / "maps").read_text()


def test_a_forked_child_holds_the_server_too(place):
    """After fork() the child keeps the server alive although its parent let go; an executed program does not."""
    held = attach(place.directory)
    child = in_child(lambda: signal.pause() or 0)
    try:
        program = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
        place.users.append(program)
        held.close()
        with attach(place.directory) as again:
            assert (again.pid, again.started) == (held.pid, False)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    until(lambda: not running(held.pid), what="the server stops beside the executed program")
    assert program.poll() is None


def test_stop_ends_a_server_that_has_users(place):
    """`stop` ends the server under its users and keeps the data; a second one says that none ran."""
    with attach(place.directory) as held, client(held.url) as server:
        server.set("written", "before")

        assert stop(place.directory)
        assert not running(held.pid)
        assert not stop(place.directory)
        with attach(place.directory) as again:
            assert again.started
            assert server.get("written") == "before"


def test_stop_works_without_the_socket(place):
    """A server whose socket was deleted, by a cleaner of /tmp or at a logout, can still be stopped."""
    with attach(place.directory) as held:
        Path(held.url.removeprefix("unix://")).unlink()

        assert stop(place.directory)
        assert not running(held.pid)


def test_inspect_tells_without_touching(place):
    """`inspect` knows nothing of a new place, sees a running server and a resting one, and starts none."""
    assert inspect(place.directory) is None
    assert not place.directory.exists()
    with attach(place.directory) as held:
        running = inspect(place.directory)
        assert (running.running, running.url, running.pid) == (True, held.url, held.pid)
        assert (running.version, running.directory) == (held.version, place.directory)
        assert running.size > 0
    until(lambda: not place.leftovers(), what="the server stops")
    resting = inspect(place.directory)
    assert (resting.running, resting.url, resting.pid, resting.version) == (False, None, None, held.version)


def test_a_deep_project_has_a_short_socket(place):
    """A data directory whose path is longer than a socket's may be has a server like any other."""
    deep = place.directory / ("d" * 80) / ("e" * 80) / "with space" / ".conveyor"
    with attach(deep) as held, client(held.url) as server:
        assert server.ping()
        assert len(held.url) < 100


def test_another_family_or_an_older_version_is_refused(place):
    """Data is opened by the family that wrote it, in the same or a newer version; else a sentence says what to do."""
    with attach(place.directory):
        pass
    until(lambda: not place.leftovers(), what="the server stops")
    record = place.record()
    family = {"Redis": "Valkey", "Valkey": "Redis"}[record["family"]]
    for other in ({"family": family}, {"version": "99.0.0"}):
        keeper.write_record(str(place.directory), {**record, **other})
        with pytest.raises(ConfigurationError, match=r"was written by .*\n.*CONVEYOR_SERVER_BIN") as refused:
            attach(place.directory)
        assert refused.value.code == "E02"
        assert not inspect(place.directory).running

    keeper.write_record(str(place.directory), {**record, "version": "6.2.0"})
    with attach(place.directory):
        assert place.record()["version"] == record["version"]


def test_a_damaged_record_is_refused(place):
    """When the record does not say which server wrote the data, no server is started on it."""
    place.directory.mkdir(parents=True)
    (place.directory / "server.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"server\.json is damaged"):
        attach(place.directory)
    (place.directory / "server.json").unlink()


def test_a_server_that_does_not_start_says_why(place):
    """When the server refuses its files, the error carries the last lines of its log, and nothing keeps running."""
    with attach(place.directory):
        stop(place.directory)
    for file in (place.directory / "data").rglob("*"):
        if file.is_file():
            file.write_bytes(b"not an append-only file, nor its manifest\n")
    with pytest.raises(StoreUnavailable, match=r"does not start\. The end of its log(.|\n)*AOF"):
        attach(place.directory)
    until(lambda: not place.leftovers(), what="nothing keeps running")


def test_a_directory_that_cannot_be_used_is_named(place):
    """A data directory that cannot be made is a mistake of the setup, named in the error."""
    place.directory.parent.mkdir(parents=True)
    place.directory.write_text("a file")
    with pytest.raises(ConfigurationError, match=r"cannot keep its data in .*\.conveyor: File exists") as refused:
        attach(place.directory)
    assert refused.value.code == "E02"
    place.directory.unlink()


def test_a_socket_directory_open_to_others_is_refused(place):
    """A socket is never put where another user could have put his own."""
    (place.runtime / "conveyor").mkdir(mode=0o755)
    with pytest.raises(ConfigurationError, match="not private"):
        attach(place.directory)


def _plant(place, what, monkeypatch):
    """Make one thing of the directory such as another user could have left it; return what has to be named."""
    kind, _, name = what.partition(" of ")
    path = place.directory / name if name else place.directory
    if kind == "link":
        path.rename(elsewhere := place.directory.with_name("elsewhere"))
        path.symlink_to(elsewhere)
        return f"{path} is a symbolic link"
    if kind == "mode":
        path.chmod(path.stat().st_mode | 0o020)
        return f"{path} may be written by other users"
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        path = place.directory
    return f"{path} belongs to the user"


@pytest.mark.row("D231")
@pytest.mark.parametrize(
    "what",
    [
        "owner", "owner of server.json", "owner of server.log", "owner of data", "mode", "mode of server.json", "mode of data",
        "link", "link of server.log", "link of server.json", "link of keeper.lock", "link of data",
    ],
)  # fmt: skip
def test_what_another_user_could_have_made_is_refused(place, monkeypatch, what):
    """A directory of which anything belongs to another user, may be written by others or is a link, is not used, by root either."""
    with attach(place.directory):
        pass
    until(lambda: not place.leftovers(), what="the server has stopped")
    (place.directory / "server.log").write_bytes(victim := b"x" * 1_500_000)  # too long: the next start would empty it
    (inner := place.directory.parent / "work" / "deep").mkdir(parents=True)
    with monkeypatch.context() as patch:
        named = _plant(place, what, patch)
        patch.chdir(inner)
        patch.delenv("CONVEYOR_URL", raising=False)

        for use in (attach, inspect, stop, Conveyor().queue("mail").stats):
            with pytest.raises(ConfigurationError, match=re.escape(named)) as refused:
                use()
            assert refused.value.code == "E02"
        assert not place.leftovers()
        assert (place.directory / "server.log").read_bytes() == victim
    if what == "link":
        place.directory.unlink()
    else:
        shutil.rmtree(place.directory)


@pytest.mark.row("D231")
def test_what_the_server_makes_is_its_own(place):
    """Under a umask that leaves files open to a group, the server's own files are private, so it is found again."""
    before = os.umask(0o002)
    try:
        for _ in range(2):
            with attach(place.directory) as held:
                client(held.url).set("key", "value")
            until(lambda: not place.leftovers(), what="the server has stopped")
    finally:
        os.umask(before)

    assert [str(path) for path in (place.directory, *place.directory.rglob("*")) if path.stat().st_mode & 0o022] == []


@pytest.mark.row("D251")
def test_a_server_that_cannot_save_is_found_and_says_so(place):
    """While the server cannot write its files, as on a full disk, others attach at once, read, and are told why a push fails."""
    with attach(place.directory) as first:
        server = client(first.url)
        server.set("key", "value")
        (place.directory / "data" / "dump.rdb").mkdir()  # so that a snapshot cannot be put there
        server.config_set("save", "3600 1")
        server.bgsave()
        until(lambda: server.info("persistence")["rdb_last_bgsave_status"] == "err", what="the snapshot has failed")

        began = time.monotonic()
        with attach(place.directory, wait=60) as second:
            assert time.monotonic() - began < 30
            assert client(second.url).get("key") == "value"
            app = Conveyor(second.url)
            app.client.retry_for = 0.2
            with pytest.raises(StoreUnavailable, match="MISCONF"):
                app.queue("mail").push("hello")
            app.close()
        server.config_set("save", "")
        assert server.ping()


@pytest.mark.row("D251")
def test_a_server_that_refuses_is_quoted(place):
    """When the server refuses what asks whether it is ready, the error says what it answered."""
    with attach(place.directory) as held:
        client(held.url).config_set("requirepass", "secret")
        with pytest.raises(StoreUnavailable, match="It answers: -NOAUTH Authentication required"):
            attach(place.directory, wait=0.2)
        redis.Redis.from_url(held.url, password="secret").config_set("requirepass", "")


def test_the_log_is_bounded(place):
    """A log that has grown beyond a megabyte begins anew with the next start."""
    place.directory.mkdir(parents=True)
    (log := place.directory / "server.log").write_bytes(b"x" * 1_500_000)
    with attach(place.directory):
        assert 0 < log.stat().st_size < 100_000


def test_a_killed_watcher_is_replaced(place):
    """When the process that waits for the lock is killed, another waits, and the last close still ends the server."""
    with attach(place.directory) as held:
        keeper_pid = place.record()["keeper"]
        children = Path(f"/proc/{keeper_pid}/task/{keeper_pid}/children").read_text().split()
        (watcher,) = {int(pid) for pid in children} - {held.pid}
        os.kill(watcher, signal.SIGKILL)
        until(lambda: not running(watcher), what="the watcher is dead")
    until(lambda: not running(held.pid), what="the server stops")


@pytest.mark.redis7
def test_a_redis_on_path_serves_as_well(place, monkeypatch):
    """Where there is a redis-server, it can be the embedded server, and its data survives a restart."""
    found = shutil.which("redis-server")
    if found is None:
        pytest.skip("no redis-server on PATH")
    monkeypatch.setenv("CONVEYOR_SERVER_BIN", found)
    with attach(place.directory) as held, client(held.url) as server:
        assert held.version.startswith("Redis ")
        server.set("written", "before")
        stop(place.directory)
        with attach(place.directory):
            assert server.get("written") == "before"
