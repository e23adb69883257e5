"""Wrong input of people is refused where it is written, in words that say what to write instead."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from conveyor import Buffer, ConfigurationError, Conveyor, Retry, StoreUnavailable
from conveyor.admin import Admin
from conveyor.errors import ConveyorError
from conveyor.jobs.core import core_of
from conveyor.jobs.task import definition_of
from conveyor.sql import Outbox
from conveyor.store.client.client import Client
from conveyor.store.transport import replies
from conveyor.worker import logs
from support.shell import Shell
from testbed.server_groups import ClusterOfNodes, SentinelGroup
from testbed.server_process import Server

Start = Callable[..., Server]


@pytest.fixture
def shell(url: str, tmp_path: Path) -> Shell:
    return Shell(tmp_path, url)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("redis://127.0.0.1:1?frist=1", "'frist' is not one of its options"),
        ("redis+cluster://127.0.0.1:1?frist=1", "'frist' is not one of its options"),
        ("rediss://127.0.0.1:1?ssl_cert_reqs=perhaps", "Requirements Flag: perhaps"),
        ("redis://127.0.0.1:1/orders", "the database must be a number, as in redis://host:6379/0"),
        ("http://127.0.0.1:1", r"Write redis://.*redis\+sentinel://.*redis\+cluster://"),
    ],
)
def test_a_url_that_means_nothing_says_what_to_write(given: str, says: str) -> None:
    """It is a ConfigurationError before anything is connected to, not an error of the client library."""
    with pytest.raises(ConfigurationError, match=says):
        Conveyor(given).queue("q").push(1)


@pytest.mark.standalone_only(
    "a cluster has one database, and the users of roles may choose none", on=("valkey", "redis6", "redis7", "tls")
)
def test_a_database_that_is_not_there(server: Server) -> None:
    """A number the server does not have is E02, for blocking and awaitable calls."""
    with pytest.raises(ConfigurationError, match="no database of that number") as caught:
        Client(re.sub(r"(/|db=)0(?=\?|$)", r"\g<1>99", server.url)).execute("PING")
    assert caught.value.code == "E02"


def test_a_sentinel_is_no_server(sentinel_group: SentinelGroup) -> None:
    """A plain URL that leads to a sentinel is E33, and says what to write."""
    with (
        Conveyor(f"redis://{sentinel_group.sentinels[0].name}") as app,
        pytest.raises(ConfigurationError, match=r"write redis\+sentinel://") as caught,
    ):
        app.queue("q").push(1)
    assert caught.value.code == "E33"


def test_a_replica_takes_nothing_and_is_called_so(start_server: Start) -> None:
    """A push to a read-only replica says that it is one, and nothing of starting a server for development."""
    replica = start_server()
    with replica.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
    client = Client(replica.url, retry_for=0.1)
    with pytest.raises(StoreUnavailable, match="is a replica and accepts no writes") as caught:
        client.push(client.keys("q"), [])
    assert "CONVEYOR_URL" not in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "says", "not_said"),
    [
        ("WRONGPASS invalid username-password pair", "Correct the user and password", "conveyor acl"),
        ("NOPERM this user has no permissions to run the 'sadd' command", "'sadd'.*`conveyor acl`", "password"),
        ("ERR ACL failure in script: script: 0123abcd, on @user_script:7.", "a script needs a command", "0123abcd"),
    ],
)
def test_a_refused_user_is_told_what_to_mend(reply: str, says: str, not_said: str) -> None:
    """A wrong password and a missing right are both E17, each with its own remedy."""
    error = replies.fatal_error(reply, "redis://host:6379/0")
    assert error.code == "E17"
    with pytest.raises(ConfigurationError, match=says):
        raise error
    assert not_said not in str(error)


def test_patience_with_a_slot_outlasts_the_end_of_its_move() -> None:
    """A call that waited for a moving slot is not given up when the slot has arrived: MOVED is the last step of the move."""
    long, short = replies.RetryTimer(5.0), replies.RetryTimer(5.0)
    assert long.next_pause("TRYAGAIN Multiple keys request during rehashing of slot") is not None
    for one in (long, short):
        one._since -= 10
    assert long.next_pause("MOVED 5718 127.0.0.1:7000") is not None
    assert short.next_pause("MOVED 5718 127.0.0.1:7000") is None
    long._since -= replies.SLOT_MOVE_TIMEOUT
    assert long.next_pause("MOVED 5718 127.0.0.1:7000") is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"url": 5}, "must be text"),
        ({"url": ""}, "The URL is empty"),
        ({"buffer": True}, "takes a Buffer"),
        ({"buffer": "spool"}, "takes a Buffer"),
        ({"max_payload": "half a page"}, "such as '256KiB'"),
        ({"max_payload": "17MiB"}, "at most 16MiB"),
    ],
)
def test_options_of_an_app_that_mean_nothing_are_refused(options: dict[str, Any], says: str) -> None:
    """None is ignored, and none ends in an error of Python's."""
    with pytest.raises(ConfigurationError, match=says):
        Conveyor(**options)


def test_sizes_are_written_alike() -> None:
    """All options accept the same notation of sizes."""
    assert core_of(Conveyor(max_payload="64KiB")).max_payload == 64 * 1024
    assert definition_of(Conveyor().task(max_payload="1KiB")(_nothing)).signature.max_payload == 1024


def _nothing() -> None: ...


def test_a_buffer_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    """Not in the middle of the first outage."""
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "spool"):
        with pytest.raises(ConfigurationError, match=r"cannot be used.*use another"):
            Conveyor("redis://127.0.0.1:1", buffer=Buffer(place))


def test_a_buffer_that_is_lost_later_says_so(tmp_path: Path) -> None:
    """A directory that is taken away before the outage makes the push fail as it would have without a buffer."""
    with Conveyor("redis://127.0.0.1:1", buffer=Buffer(tmp_path / "spool", linger=0)) as app:
        app.client.retry_for = 0.1
        (tmp_path / "spool").rmdir()
        (tmp_path / "spool").write_text("")
        with pytest.raises(StoreUnavailable):
            app.queue("q").push(1)


def test_a_queue_declared_twice_names_what_differs() -> None:
    """The error names the options that differ, and leaves out those that agree."""
    app = Conveyor()
    app.queue("orders", int, max_length=5)
    with pytest.raises(
        ConfigurationError, match=r"options: type=int, max_length=5 and type=str, max_length=6\. Declare"
    ):
        app.queue("orders", str, max_length=6)


@pytest.mark.parametrize("partitions", [1, 2])
def test_a_misspelt_option_of_push_names_push(partitions: int) -> None:
    """The error speaks of the function that was called, not of one inside."""
    queue = Conveyor().queue("q", partitions=partitions)
    with pytest.raises(TypeError, match=r"push\(\) got an unexpected keyword argument 'prio'"):
        queue.push(1, prio=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("option", ["on", "give_up"])
def test_a_policy_takes_classes(option: str) -> None:
    """A name in quotes would only be noticed when the first job fails."""
    with pytest.raises(ConfigurationError, match=rf"Retry\({option}=…\) takes exception classes"):
        Retry(**{option: ("ValueError",)})  # type: ignore[arg-type]
    assert Retry(on=ValueError, give_up=()).on is ValueError


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": 0},
        {"threads": -1},
        {"queues": "mail"},
        {"queues": {"mail": 0}},
        {"queues": {"mail": "x"}},
        {"queues": {}},
    ],
)
def test_an_embedded_worker_that_could_do_nothing_is_refused(options: dict[str, Any]) -> None:
    """Where it is made, not by standing still."""
    app = Conveyor()
    app.task(_nothing)
    with pytest.raises(ConfigurationError, match=r"worker\("):
        app.worker(**options)
    with pytest.raises(ConfigurationError, match="Invalid queue name"):
        app.worker(queues={"no queue": 1})


def test_a_worker_repeats_a_complaint_once_a_minute(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    """The same words are said once a minute, others at once."""
    now = 1000.0
    monkeypatch.setattr(logs, "monotonic", lambda: now)
    monkeypatch.setattr(logs, "_logged_at", {})
    with caplog.at_level(logging.ERROR, "conveyor.worker"):
        for _ in range(5):
            logs.log_repeated_error("queue %s: refused", "a")
        logs.log_repeated_error("queue %s: refused", "b")
        now += logs.REPEAT_AFTER
        logs.log_repeated_error("queue %s: refused", "a")
    assert [record.getMessage() for record in caplog.records] == [f"queue {name}: refused" for name in "aba"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("push", "q", "1", "--expires", "0"), 2, "expires must be longer than 0"),
        (("push", "q", "1", "--front", "--delay", "5s"), 2, "front=True"),
        (("push", "q", "1", "--header", "a=" + "x" * 9000), 2, "E21"),
        (("enqueue", "t", "--in", "1s", "--at", "2026-05-01T09:00Z"), 2, "--in and --at both say when"),
        (
            ("enqueue", "-A", "wrong_input_app", "t", "--at", "2026-05-01T09:00"),
            2,
            "E18  --at '2026-05-01T09:00' has no time zone",
        ),
    ],
)
def test_the_command_line_checks_as_python_does(shell: Shell, words: tuple[str, ...], code: int, says: str) -> None:
    """The command line refuses what Python refuses, in its own words where they differ."""
    (shell.directory / "wrong_input_app.py").write_text(
        "from conveyor import Conveyor\napp = Conveyor()\n@app.task(name='t')\ndef t(): ...\n"
    )
    done = shell.run(*words)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr


def test_a_worker_mentions_a_queue_no_task_goes_to(shell: Shell) -> None:
    """A misspelt -q looks like a queue without work, so the worker says it at the start, and works on."""
    (shell.directory / "mail_app.py").write_text(
        "from conveyor import Conveyor\napp = Conveyor()\n@app.task(queue='mail')\ndef t(): ...\n"
    )
    done = shell.run("worker", "mail_app:app", "-q", "mial", "--burst")
    assert done.returncode == 0, done.stderr
    assert "No task of this app goes to queue 'mial'" in done.stderr
    assert "Did you mean 'mail'?" in done.stderr
    assert "No task" not in shell.run("worker", "mail_app:app", "-q", "mail:3", "--burst").stderr


def test_a_cluster_with_a_dead_node_is_examined_all_the_same(cluster: ClusterOfNodes, monkeypatch: Any) -> None:
    """The doctor reports the node that does not answer as a problem, and the others as ever; with no node at all it raises."""
    from conveyor.admin import doctor

    client, answers = Client(cluster.url, retry_for=0.3), doctor._check_server
    gone = cluster.masters()[0].name

    def server(one: Client, report: doctor.HealthReport) -> None:
        if report.url == gone:
            raise replies.unavailable(gone, "Connection refused")
        answers(one, report)

    monkeypatch.setattr(doctor, "_check_server", server)
    report = doctor.examine(client)
    assert [(one.name, one.code) for one in report.problems if one.name == "node"] == [("node", "E01")]
    assert {one.text.partition(": ")[0] for one in report.findings if one.name == "role"} == {
        node.name for node in cluster.masters() if node.name != gone
    }
    client.close()
    with pytest.raises(ConveyorError, match="no node of the cluster answers"):
        doctor.examine(Client("redis+cluster://127.0.0.1:1", retry_for=0.1))


@pytest.mark.leaves_keys("the record of the last finished jobs")
def test_a_deleted_dead_letter_is_not_shown_as_dead(shell: Shell) -> None:
    """After `job delete` the job is not known any more, although a worker noted its end."""
    (shell.directory / "bad_app.py").write_text(
        "from conveyor import Conveyor\napp = Conveyor()\n@app.task(retry=1)\ndef bad(): raise ValueError('no')\n"
    )
    job = shell.run("enqueue", "-A", "bad_app", "bad").stdout.strip()
    assert shell.run("worker", "bad_app:app", "--burst").returncode == 0
    assert "dead" in shell.run("job", "show", job).stdout
    assert shell.run("job", "delete", job, "--yes").returncode == 0
    assert shell.run("job", "show", job).returncode == 5


def test_a_worker_that_cannot_go_on_says_why_in_a_line(shell: Shell) -> None:
    """An error that says what to do ends a worker process with its text and code, and no traceback of ours."""
    (shell.directory / "lamp_app.py").write_text(
        "from conveyor import ConfigurationError, Conveyor\napp = Conveyor()\n"
        "@app.task\ndef t(): ...\n"
        "@app.lifespan\nasync def lamp():\n    raise ConfigurationError('The lamp is dark. Plug it in.')\n    yield {}\n"
    )
    with shell.start("worker", "lamp_app:app") as running:
        try:
            assert running.stderr is not None
            lines = []
            while not lines or "cannot continue" not in lines[-1]:
                lines.append(running.stderr.readline())
                assert lines[-1], lines
        finally:
            running.terminate()
            rest = running.communicate(timeout=60)[1]
    assert "The worker cannot continue: E02 The lamp is dark. Plug it in." in lines[-1]
    assert "Traceback" not in "".join(lines) + rest


def _add(a: int, b: int) -> int:
    return a + b


CALLS_THAT_MEAN_NOTHING: dict[str, tuple[Callable[[Conveyor, Any], object], str]] = {
    "tuples": (lambda app, add: app.enqueue_many([(1, 2)]), r"takes calls of tasks, such as .*, not \(1, 2\)"),
    "a task": (lambda app, add: app.enqueue_many([add.s(1, 2), add]), "takes calls of tasks"),
    "one call": (lambda app, add: app.enqueue_many(add.s(1, 2)), "takes calls of tasks"),
    "spread": (lambda app, add: app.enqueue_many([5], spread="1m"), "takes calls of tasks"),
    "tagged": (lambda app, add: app.enqueue_many(iter([5]), tags=["a"]), "takes calls of tasks"),
    "tags": (lambda app, add: app.enqueue_many([add.s(1, 2)], tags="order"), "takes a list of texts"),
    "by task": (lambda app, add: app.enqueue(add, 1, 2), r"takes the name of a task. Write:  _add\.enqueue"),
    "an id": (lambda app, add: app.job(5), "is a text, .* not 5"),
    "an id of a task": (lambda app, add: add.job(None), "is a text, .* not None"),
    "watched": (lambda app, add: app.watch("default:1"), "takes several jobs"),
    "watched items": (lambda app, add: app.awatch([5]), "is a text, .* not 5"),
    "events": (lambda app, add: app.events(5), "the name of one, not 5"),
    "jobs": (lambda app, add: app.jobs(queue=5), "the name of one, not 5"),
    "redriven": (lambda app, add: app.redrive(5), "the name of one, not 5"),
    "redriven limit": (lambda app, add: app.redrive("q", limit=-1), "limit must be a whole number"),
    "listener": (lambda app, add: app.on("dead", 5), "takes a function"),
    "admin": (lambda app, add: Admin(cast("Any", app)), r"Write: Admin\(app\.client\)"),
    "outbox": (lambda app, add: Outbox(add), "takes an app, such as"),
    "outbox connection": (lambda app, add: Outbox(app, cast("Any", 5)), "takes a function that opens"),
}


@pytest.mark.parametrize(("call", "says"), CALLS_THAT_MEAN_NOTHING.values(), ids=CALLS_THAT_MEAN_NOTHING.keys())
def test_calls_that_mean_nothing_are_refused_before_anything_is_sent(
    call: Callable[[Conveyor, Any], object], says: str
) -> None:
    """They are a ConfigurationError that names what was given, not an AttributeError, and no server is asked."""
    app = Conveyor("redis://127.0.0.1:1")
    with pytest.raises(ConfigurationError, match=says):
        call(app, app.task(_add))
