"""Servers and clients for all tests; CONTRIBUTING.md says what each fixture gives."""

from __future__ import annotations

import compileall
import faulthandler
import functools
import itertools
import os
import random
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import redis as redis_py
import redis.utils
from _pytest.faulthandler import fault_handler_stderr_fd_key

import conveyor
from conveyor.jobs.app import Conveyor
from support import server_kinds
from support.leaked_keys import complaint, leaked
from support.manual_worker import drain
from testbed.server_process import Server, find_binary

pytest_plugins = [
    "pytester", "support.message_fixtures", "support.cluster_fixtures", "support.databases", "support.time_limits",
]  # fmt: skip

# redis-py reads the metadata of its installation for each connection, of which the tests open many thousands: 1 ms each.
redis.utils.get_lib_version = functools.cache(redis.utils.get_lib_version)

_OLDER = ("redis6", "redis7")
_LONGEST_ROUNDS = 7200.0
"""Seconds that a test may take with --full, unless a limit is given with `-o faulthandler_timeout=…`."""


def pytest_configure(config: pytest.Config) -> None:
    """Compile the package, and restore SIGINT where a background shell ignored it: programs under test inherit the setting."""
    # Else each of the many processes that the tests start compiles the whole package: 1.3 s of 1.8 s.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if not hasattr(config, "workerinput"):  # once, and not in each process of xdist
        compileall.compile_dir(Path(conveyor.__file__).parent, quiet=2)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Counts of a release: `make test ARGS=--full`."""
    parser.addoption(
        "--full", action="store_true", help="as many rounds as docs/reliability.md states, not the fewer of CI"
    )
    parser.addoption(
        "--on",
        type=server_kinds.checked_place,
        help=f"run the tests that use the shared server there, and no others: {', '.join(server_kinds.PLACES)}, or a path",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """
    Start what takes long first. With `--on`, leave out what has no use for the place.

    Then also skip what only a single server can show.
    """
    _long_first(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    place = config.getoption("--on")
    if place is None:
        return
    chosen = [item for item in items if _uses_the_server(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
    for item in items:
        alone = item.get_closest_marker("standalone_only")
        if reason := server_kinds.missing(place):
            item.add_marker(pytest.mark.skip(reason=reason))
        elif alone is not None and server_kinds.kind(place) not in alone.kwargs.get("on", server_kinds.ALONE):
            item.add_marker(pytest.mark.skip(reason=f"not on {place}: {alone.args[0]}"))


def _long_first(items: list[pytest.Item], processes: int) -> None:
    """Deal what takes long to the starts of the parts that the processes are given: none is left alone with it at the end."""
    long = [item for item in items if item.get_closest_marker("long") is not None]
    rest = _mixed([item for item in items if item.get_closest_marker("long") is None], processes)
    total, dealt = len(items), list[pytest.Item]()
    for number in range(processes):
        size = (total - len(dealt)) // (processes - number)  # as `--dist worksteal` cuts them
        mine = long[number::processes]
        dealt += mine + rest[: max(0, size - len(mine))]
        del rest[: max(0, size - len(mine))]
    items[:] = dealt + rest


def _mixed(items: list[pytest.Item], processes: int) -> list[pytest.Item]:
    """Put files into another order, the same each time: tests that wait, of a worker for example, run beside tests that do not."""
    files = [list(run) for _, run in itertools.groupby(items, lambda item: item.path)]
    if processes > 1:
        random.Random(1).shuffle(files)
    return list(itertools.chain.from_iterable(files))


def _uses_the_server(item: pytest.Item) -> bool:
    """Tell whether a test uses the server all share, and not one of its own module's."""
    found = item._fixtureinfo.name2fixturedefs.get("server") if isinstance(item, pytest.Function) else None
    return bool(found) and found[-1].func.__module__ == __name__


@pytest.hookimpl(wrapper=True)
def _limited(item: pytest.Item) -> Generator[None, object, object]:
    """
    End the process, with the stacks of all threads, where a part of a test hangs.

    The limit of pytest itself is lifted as soon as a test has failed, so that its fixtures might wait for ever at their end.
    """
    limit, given = float(item.config.getini("faulthandler_timeout")), item.config.getoption("override_ini") or ()
    if item.config.getoption("--full") and not any(one.startswith("faulthandler_timeout") for one in given):
        limit = _LONGEST_ROUNDS
    if limit:
        stderr = item.config.stash[fault_handler_stderr_fd_key]
        faulthandler.dump_traceback_later(limit, file=stderr, exit=True)
    return (yield)


pytest_runtest_setup = pytest_runtest_call = pytest_runtest_teardown = _limited


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """The number of rounds of a fault: `rounds(500, 20)` is the first with --full, the second without."""
    whole = bool(request.config.getoption("--full"))
    return lambda full, ci: full if whole else ci


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Let a marked test run again on the older servers."""
    marks = [name for name in _OLDER if metafunc.definition.get_closest_marker(name)]
    if not marks or "server" not in metafunc.fixturenames or metafunc.config.getoption("--on"):
        return
    params = [pytest.param("valkey")]
    for name in marks:
        missing = [] if find_binary(name) else [pytest.mark.skip(reason=f"{name}: this server is not installed")]
        params.append(pytest.param(name, marks=missing))
    metafunc.parametrize("server", params, indirect=True, scope="session")


@pytest.fixture(scope="session")
def directory() -> Iterator[Path]:
    """A directory with a short path: a socket's path ends at 107 bytes, and pytest's own are long."""
    with tempfile.TemporaryDirectory(prefix="cv", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def servers() -> Iterator[dict[str, Server]]:
    """The servers of this run by name: each is started when first asked for, and once."""
    started: dict[str, Server] = {}
    yield started
    for server in started.values():
        server.kill()


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, servers: dict[str, Server], directory: Path) -> Server:
    """A real server shared by all tests; Valkey where the test is not marked for others too."""
    name = request.config.getoption("--on") or getattr(request, "param", "valkey")
    if name not in servers:
        servers[name] = server_kinds.start(name, directory / Path(name).name)
    return servers[name]


@pytest.fixture
def start_server(directory: Path) -> Iterator[Callable[..., Server]]:
    """Start a server of the test's own: `start_server("--maxmemory", "8mb", name="redis7")`."""
    started: list[Server] = []

    def start(*options: str, name: str = "valkey") -> Server:
        binary = find_binary(name)
        if binary is None:
            pytest.skip(f"{name}: this server is not installed")
        place = next(p for n in itertools.count() if not (p := directory / f"own{n}").exists())
        started.append(Server(binary, place, *options))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def url(server: Server) -> str:
    """The URL of the server, emptied."""
    with server.client() as client:
        client.flushall(asynchronous=False)
    return server.url


@pytest.fixture
def redis(url: str, server: Server) -> Iterator[redis_py.Redis]:
    """A synchronous client of the emptied server, with bytes as replies."""
    with server.client() as client:
        yield client


@pytest.fixture(autouse=True)
def no_leaked_keys(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that used `url` and leaves keys behind which never go away."""
    # Autouse comes first and so ends last: whatever the test's own fixtures tidy up is gone by then.
    yield
    if "url" not in request.fixturenames or request.node.get_closest_marker("leaves_keys"):
        return
    with request.getfixturevalue("server").client() as client:
        names = leaked(client)
    if names:
        pytest.fail(complaint(names), pytrace=False)


@pytest.fixture
def app(url: str) -> Iterator[Conveyor]:
    """An app on the emptied server; its queues are drained and its connections closed at the end."""
    with Conveyor(url) as app:
        yield app
        drain(app)
