"""The command line through real invocations: its output, its streams, its exit codes."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import unicodedata
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import pytest
from click.testing import CliRunner

from conveyor.admin.admin import Admin
from conveyor.cli import cli
from conveyor.cli.filters import instant
from conveyor.cli.output import clock_time
from conveyor.ids import clean
from conveyor.messaging.queue import Queue
from conveyor.store.client.client import Client
from conveyor.worker.logs import SafeFormatter
from support.client_worker import ClientWorker, dead, push
from support.shell import Shell
from support.terminal import on_terminal, plain
from support.waiting import until_said

pytestmark = pytest.mark.leaves_keys("jobs are pushed here to be looked at")


def documents(text: str) -> dict[str, object]:
    """Return the one JSON document of *text*."""
    found: dict[str, object] = json.loads(text)
    return found


def test_a_queue_is_shown_with_its_newest_failures(url: str, backend: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Showing a queue reads a bounded number of dead letters and says so; with --all it reads all of them."""
    for message in ("one", "two", "three"):
        dead(backend, "mail", message)
    monkeypatch.setattr("conveyor.cli.queue.MOST_DEAD_LETTERS", 2)
    show = ["queue", "show", "mail", "--url", url]

    some, whole = CliRunner().invoke(cli, show), CliRunner().invoke(cli, [*show, "--all"])

    assert "Read: the newest 2 of 3. All: conveyor queue show QUEUE --all" in some.stderr
    assert (some.stdout.count("ValueError"), whole.stdout.count("ValueError")) == (2, 3)
    assert "Read:" not in whole.stderr


def test_status_reads_a_bounded_number_of_failures(url: str, backend: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """`conveyor status` reads the newest dead letters of a queue, at most so many, and says how many there are."""
    for message in ("one", "two", "three"):
        dead(backend, "mail", message)
    monkeypatch.setattr("conveyor.cli.status._MOST_DEAD_LETTERS", 2)

    done = CliRunner().invoke(cli, ["status", "--json", "--url", url])

    failures = json.loads(done.stdout)["failures"]
    assert (failures["read"], failures["total"]) == (2, 3)


# -- loading and help ---------------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    """`conveyor --help` names every command without importing redis, asyncio or msgspec, or any command's module."""
    code = (
        "import sys; from conveyor.cli import COMMANDS, main; code = main(['--help'])\n"
        "heavy = {'redis', 'asyncio', 'msgspec', 'conveyor.admin', *(e.target.partition(':')[0] for e in COMMANDS.values())}\n"
        "print(sorted(heavy & set(sys.modules)), code, all(name in sys.argv for name in []))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=Shell(tmp_path).environment(), capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines()[-1].startswith("[] 0")
    for name in ("worker", "push", "enqueue", "status", "queue", "job", "doctor", "server"):
        assert f"  {name} " in done.stdout


def test_reading_commands_load_what_reads_alone(tmp_path: Path, url: str) -> None:
    """
    Commands that read load no queue to act on, no task, no metrics, no worker, no dashboard, and make no dataclass; `job list` alone
    loads the search.

    A dataclass takes half a millisecond to make where a struct of msgspec takes a hundredth of that, and there are fifty of them.
    """
    code = """
import dataclasses, sys
from conveyor.cli import main

for words in ("status", "queue list", "workers list", "job list"):
    assert "conveyor.admin.search" not in sys.modules
    assert main(words.split()) in (0, 8), words
heavy = (
    "conveyor.jobs.app", "conveyor.jobs.core", "conveyor.jobs.registry", "conveyor.admin.metrics",
    "conveyor.admin.blob_sweep", "conveyor.messaging.queue", "conveyor.messaging.consumer", "conveyor.messaging.outbox",
    "conveyor.worker", "conveyor.dashboard", "starlette", "statistics", "fractions",
)
ours = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "conveyor"]
made = {f"{module.__name__}.{name}" for module in ours for name, value in vars(module).items() if dataclasses.is_dataclass(value)}
print(sorted({name for name in sys.modules if name.startswith(heavy)} | made))
"""
    shell = Shell(tmp_path, url)
    done = subprocess.run(
        [sys.executable, "-c", code], env=shell.environment(), cwd=tmp_path, capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_has_help() -> None:
    """Every command of the table can be loaded, and it and each of its subcommands explain themselves."""
    from click.testing import CliRunner

    from conveyor.cli import COMMANDS, cli

    for name in COMMANDS:
        command = cli.get_command(None, name)  # type: ignore[arg-type]
        for words in [[name], *([name, sub] for sub in getattr(command, "commands", {}))]:
            result = CliRunner().invoke(cli, [*words, "--help"])
            assert result.exit_code == 0, words
            assert "Usage:" in result.output


def test_unknown_command_is_usage(shell: Shell) -> None:
    """A mistyped command ends with 2 and names the closest."""
    done = shell.run("pus", "mail", "1")

    assert (done.returncode, done.stdout) == (2, "")
    assert "Did you mean 'push'?" in done.stderr


# -- push ---------------------------------------------------------------------------------------------------------


def test_push_prints_the_id_alone(shell: Shell, backend: Client) -> None:
    """`push QUEUE JSON` stores the message and prints its id, nothing else."""
    done = shell.run("push", "mail", '{"id": 1}', "--header", "a=b", "--priority", "3", "--delay", "1h")

    assert (done.returncode, done.stderr) == (0, "")
    (id_,) = done.stdout.split()
    job = Admin(backend).job(id_)
    assert (job.payload, job.headers, job.priority, job.status) == ('{"id": 1}', {"a": "b"}, 3, "scheduled")


def test_push_reads_one_message_a_line(shell: Shell, backend: Client) -> None:
    """`push QUEUE -` prints an id for each line, in their order; blank lines are none."""
    done = shell.run("push", "mail", "-", stdin='1\n\n"two"\n{"three": 3}')

    ids = done.stdout.split()
    assert done.returncode == 0
    assert [(job.id, job.payload) for job in Admin(backend).jobs("mail")] == list(
        zip(ids, ["1", '"two"', '{"three": 3}'], strict=True)
    )


def test_push_passes_a_slow_pipe_on(shell: Shell, backend: Client) -> None:
    """A line is stored when it arrives, not when its pipe ends."""
    process = shell.start("push", "mail", "-")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("1\n")
    process.stdin.flush()
    first = until_said(process).strip()

    assert Admin(backend).job(first).status == "ready"

    process.communicate("2\n", timeout=30)
    assert process.returncode == 0
    assert Admin(backend).queue("mail").ready == 2


@pytest.mark.parametrize("bad", ["{bad", "", "nan", "[" * 500 + "]" * 500])
def test_bad_message_stores_nothing(shell: Shell, backend: Client, bad: str) -> None:
    """A line that is no JSON, or too deep, ends the command with 2 and its number, and nothing of the input is stored."""
    done = shell.run("push", "mail", "-", stdin=f"1\n{bad or '}'}\n")

    assert (done.returncode, done.stdout) == (2, "")
    assert "line 2" in done.stderr
    assert done.stderr.startswith("error E")
    assert "Traceback" not in done.stderr
    assert backend.queues() == []


def test_file_is_checked_as_a_whole(shell: Shell, backend: Client) -> None:
    """Of a file with one message that is too large nothing is stored, wherever it stands."""
    shell.write("rows.jsonl", "1\n" * 50_000 + '"' + "x" * 600_000 + '"\n2\n')

    with (shell.directory / "rows.jsonl").open() as rows:
        done = subprocess.run(
            [sys.executable, "-m", "conveyor", "push", "mail", "-"], stdin=rows, cwd=shell.directory,
            env=shell.environment(), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error E21")
    assert "line 50001 " in done.stderr
    assert backend.queues() == []


def test_pipe_says_what_was_stored(shell: Shell, backend: Client) -> None:
    """Of a pipe, which is passed on as it comes, a bad message says how many before it were stored."""
    done = shell.run("push", "mail", "-", stdin="1\n2\n" + '"' + "x" * 600_000 + '"')

    assert done.returncode == 2
    assert len(done.stdout.split()) == Admin(backend).queue("mail").ready == 2
    assert "after 2 messages that were stored" in done.stderr


def test_push_with_an_own_id_twice(shell: Shell, backend: Client) -> None:
    """The same --id again prints the same id and stores nothing more; at the front it goes before what waits."""
    first = shell.run("push", "mail", "1", "--id", "order-1")
    again = shell.run("push", "mail", "2", "--id", "order-1")
    shell.run("push", "mail", "0", "--front")

    assert first.stdout == again.stdout == "order-1\n"
    assert [job.payload for job in Admin(backend).jobs("mail")] == ["0", "1"]


def test_push_without_a_message_on_a_bad_queue(shell: Shell) -> None:
    """A queue's name is checked before anything is sent."""
    done = shell.run("push", "no queue", "1")

    assert done.returncode == 2
    assert "'no queue'" in done.stderr


# -- queue --------------------------------------------------------------------------------------------------------


def test_queue_list_piped_and_json(shell: Shell, backend: Client) -> None:
    """Piped, a queue is one tab-separated line without headings; with --json one document that names its schema."""
    push(backend, "mail", b"1", b"2")

    piped = shell.run("queue", "list")
    document = documents(shell.run("queue", "list", "--json").stdout)

    assert piped.stdout.rstrip("\n").split("\t")[:6] == ["mail", "2", "0", "0", "0", "0"]
    assert document["schema"] == "conveyor/queues@1"
    (mail,) = document["queues"]  # type: ignore[misc]
    assert (mail["name"], mail["ready"], mail["paused"]) == ("mail", 2, False)


def test_queue_pause_resume_show(shell: Shell, backend: Client) -> None:
    """Pause and resume are seen by show."""
    push(backend, "mail", b"1")

    assert shell.run("queue", "pause", "mail").returncode == 0
    assert "paused\ttrue" in shell.run("queue", "show", "mail").stdout
    assert shell.run("queue", "resume", "mail").returncode == 0
    assert "paused\tfalse" in shell.run("queue", "show", "mail").stdout


def test_all_queues_are_paused(shell: Shell, backend: Client) -> None:
    """--all pauses and resumes every queue and says how many; it goes with nothing else, and nothing at all is refused."""
    for name in ("mail", "media"):
        push(backend, name, b"1")

    for wrong in (["mail", "--all"], ["--all", "--task", "x"], ["--all", "--group", "x"], []):
        assert shell.run("queue", "pause", *wrong).returncode == 2
    assert [one.paused for one in Admin(backend).queues()] == [False, False]
    assert shell.run("queue", "pause", "--all").returncode == 0
    assert [one.paused for one in Admin(backend).queues()] == [True, True]
    document = json.loads(shell.run("queue", "resume", "--all", "--json").stdout)
    assert (document["queue"], document["queues"], document["paused"]) == (None, ["mail", "media"], False)
    assert [one.paused for one in Admin(backend).queues()] == [False, False]


def test_purge_asks(shell: Shell, backend: Client) -> None:
    """Without a terminal purge says how many and ends with 6; --dry-run removes nothing; --yes removes."""
    push(backend, "mail", *[b"1"] * 12)

    unasked = shell.run("queue", "purge", "mail")
    dry = shell.run("queue", "purge", "mail", "--dry-run")
    assert (unasked.returncode, unasked.stdout) == (6, "")
    assert "12 jobs" in unasked.stderr
    assert (dry.returncode, dry.stdout) == (0, "12\n")
    assert Admin(backend).queue("mail").ready == 12

    done = shell.run("queue", "purge", "mail", "--yes")
    assert (done.returncode, done.stdout) == (0, "12\n")
    assert Admin(backend).queue("mail").ready == 0


def test_redrive_prints_how_many(shell: Shell, backend: Client) -> None:
    """Redrive puts dead letters back and prints their number."""
    dead(backend, "mail", "a", "b", "c")

    done = shell.run("queue", "redrive", "mail", "--limit", "2", "--yes", "--json")

    assert documents(done.stdout) == {
        "schema": "conveyor/redrive@1", "queue": "mail", "dry_run": False, "redriven": 2,
    }  # fmt: skip
    assert Admin(backend).queue("mail").ready == 2


# -- job ----------------------------------------------------------------------------------------------------------


def test_job_ids_flow_through_pipes(shell: Shell, backend: Client) -> None:
    """`job list -q` prints ids that `job retry -` takes."""
    ids = dead(backend, "mail", "a", "b")

    listed = shell.run("job", "list", "-q", "--state", "dead", "--queue", "mail")
    assert sorted(listed.stdout.split()) == sorted(ids)
    retried = shell.run("job", "retry", "-", stdin=listed.stdout)

    assert retried.returncode == 0
    assert Admin(backend).queue("mail").ready == 2


def test_job_show(shell: Shell, backend: Client) -> None:
    """`job show` names state, payload and errors; in JSON all of them, under a schema."""
    (id_,) = dead(backend, "mail", "no such user", task="shop.send")

    text = shell.run("job", "show", id_)
    document = documents(shell.run("job", "show", id_, "--json").stdout)

    assert "state\tdead\n" in text.stdout
    assert "error.1\tValueError: no such user\n" in text.stdout
    assert document["schema"] == "conveyor/job@1"
    job = document["job"]
    assert job["task"] == "shop.send"  # type: ignore[index]
    assert job["errors"][0]["at"] == "2023-11-14T22:13:20.000Z"  # type: ignore[index]


def test_a_hostile_message_stays_on_its_line(shell: Shell, backend: Client) -> None:
    """Text from jobs cannot steer the terminal or forge lines and columns."""
    dead(backend, "mail", "\x1b[2Jfirst\nsecond\tthird")

    done = shell.run("job", "list", "--state", "dead")

    assert len(done.stdout.splitlines()) == 1
    assert "\x1b" not in done.stdout
    assert "\\x1b[2Jfirst\\nsecond\\tthird" in done.stdout


def test_cancel_and_delete_ask_when_it_matters(shell: Shell, backend: Client) -> None:
    """One job is cancelled at once; many, and every deletion, need a yes."""
    ids = push(backend, "mail", b"1", b"2", b"3")

    assert shell.run("job", "cancel", ids[0]).returncode == 0
    many = shell.run("job", "cancel", ids[1], ids[2])
    deletion = shell.run("job", "delete", ids[1])
    assert (many.returncode, deletion.returncode) == (6, 6)
    assert "2 jobs" in many.stderr
    assert Admin(backend).queue("mail").ready == 2

    assert shell.run("job", "delete", ids[1], ids[2], "--yes").returncode == 0
    assert Admin(backend).queue("mail").ready == 0


def test_unknown_names_end_with_5(shell: Shell, backend: Client) -> None:
    """A job or queue that is not there ends with 5; one that cannot be acted on with 6."""
    (waiting,) = push(backend, "mail", b"1")

    for words in (["job", "show", "nope"], ["job", "cancel", "nope"], ["queue", "show", "nope"]):
        assert shell.run(*words).returncode == 5, words
    assert shell.run("job", "retry", waiting).returncode == 6


# -- status and doctor --------------------------------------------------------------------------------------------


def test_a_page_says_whether_there_are_more(shell: Shell, backend: Client) -> None:
    """On a terminal `job list` says how to get more jobs when there are more than it shows, and only then."""
    push(backend, "q", *(f"{n}".encode() for n in range(3)))

    shown = on_terminal(shell, "job", "list", "--limit", "2")
    assert shown.count("ready") == 2
    assert "Showing 2 of 3. More: --limit 4, or --offset 2" in shown
    assert "More:" not in on_terminal(shell, "job", "list", "--limit", "3")


def test_a_piped_list_is_whole(shell: Shell, backend: Client) -> None:
    """Through a pipe `job list` prints all jobs, so that the command behind it acts on all; a terminal shows fifty."""
    ids = push(backend, "q", *(f"{n}".encode() for n in range(60)))

    listed = shell.run("job", "list", "-q")
    assert listed.stdout.splitlines() == ids
    assert shell.run("job", "list", "--limit", "2").stdout.count("\n") == 2
    assert len(json.loads(shell.run("job", "list", "--json").stdout)["jobs"]) == 60
    cancelled = shell.run("job", "cancel", "-", "--yes", stdin=listed.stdout)
    assert cancelled.stdout.count("cancelled") == 60
    push(backend, "q", *(f"{n}".encode() for n in range(60)))
    assert "Showing 50 of 60." in on_terminal(shell, "job", "list")


def test_pids_are_names_and_no_quantities(shell: Shell, backend: Client) -> None:
    """A terminal shows a pid as `ps` does, without separators between thousands; a worker without one has none."""
    push(backend, "mail", b"1")
    plant_worker(backend, b'{"host":"h","pid":1234567}')
    shown = on_terminal(shell, "queue", "show", "mail", expected={0, 8})
    assert "1234567" in shown
    assert "1,234,567" not in shown


def test_full_disk_is_named(shell: Shell) -> None:
    """A command that cannot write to standard output says so, and ends with 1."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "conveyor", "queue", "list", "--json"],
            cwd=shell.directory, env=shell.environment(), stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip

    assert done.returncode == 1
    assert done.stderr == "error E00  Cannot write to standard output: No space left on device\n"


def test_status_is_8_when_jobs_are_stranded(shell: Shell, backend: Client) -> None:
    """Status ends with 0 while workers take what is ready, and with 8 and E12 when nobody does."""
    push(backend, "mail", b"1")
    ClientWorker(backend, "mail")
    well = shell.run("status")
    push(backend, "mial", b"1")
    ill = shell.run("status")
    document = documents(shell.run("status", "--json").stdout)

    assert (well.returncode, ill.returncode) == (0, 8)
    assert len(ill.stdout.splitlines()) == 2
    assert "E12" in ill.stderr
    assert (document["schema"], document["healthy"]) == ("conveyor/status@1", False)


def test_doctor_exit_codes(shell: Shell, start_server: object) -> None:
    """Doctor ends with 0 on a sound server and with 8 on one that evicts, in the same words as its JSON."""
    evicting = start_server("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")  # type: ignore[operator]
    well = shell.run("doctor")
    ill = shell.run("doctor", "--json", "--url", evicting.url)

    assert (well.returncode, ill.returncode) == (0, 8)
    assert all(len(line.split("\t")) == 5 for line in well.stdout.splitlines())
    document = documents(ill.stdout)
    assert document["schema"] == "conveyor/doctor@1"
    assert any(finding["code"] == "E10" for finding in document["findings"])  # type: ignore[index,union-attr]


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["redis://:s3cr3t-canary@127.0.0.1:1/0", "redis://127.0.0.1:1/0?password=s3cr3t-canary"]
)
def test_absent_server_ends_with_3_soon_and_keeps_secrets(shell: Shell, place: str) -> None:
    """Every command against an absent server ends with 3 soon, says E01, and prints no password, even with -v."""
    for words in (
        ["status"],
        ["push", "mail", "1"],
        ["queue", "list", "-v"],
        ["job", "show", "x"],
        ["doctor", "--json"],
    ):
        done, waited = shell.run_waiting(*words, CONVEYOR_URL=place)

        assert done.returncode == 3, words
        assert waited <= 1, words  # a program would wait 5 s for Redis
        assert done.stderr.startswith("error E01  Cannot reach Redis at redis://")
        assert "s3cr3t" not in done.stdout + done.stderr
        assert ("Traceback" in done.stderr) == ("-v" in words)


def test_wrong_password_is_refused_without_showing_it(shell: Shell, start_server: object) -> None:
    """A refused login ends with 6 and E17."""
    server = start_server()  # type: ignore[operator]
    with server.client() as client:
        client.config_set("requirepass", "right-canary")
    done = shell.run("queue", "list", CONVEYOR_URL=server.url.replace("unix://", "unix://:wrong-canary@"))

    assert done.returncode == 6
    assert done.stderr.startswith("error E17")
    assert "canary" not in done.stdout + done.stderr


def test_wrong_url_is_usage(shell: Shell) -> None:
    """A URL of another kind ends with 2."""
    done = shell.run("status", "--url", "http://example.org")

    assert done.returncode == 2
    assert "not a Redis URL" in done.stderr


# -- server -------------------------------------------------------------------------------------------------------


def test_server_start_status_stop(tmp_path: Path) -> None:
    """The embedded server runs as long as `server start`, commands find it without a URL, and ctrl-C ends both."""
    shell = Shell(tmp_path)
    shell.write("pyproject.toml", "")
    assert shell.run("server", "status").returncode == 5

    process = shell.start("server", "start")
    url = until_said(process).strip()
    assert url.startswith("unix:///")
    assert f"url\t{url}" in shell.run("server", "status").stdout
    assert shell.run("push", "mail", "1").returncode == 0
    assert shell.run("queue", "list").stdout.startswith("mail\t1\t")

    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert shell.run("server", "stop").returncode == 0
    assert shell.run("server", "status").returncode == 5


# -- what reaches a terminal --------------------------------------------------------------------------------------


HOSTILE = "a\u202eb\u2028c\u2029d\x85e\x9b31mf\u2066g\u200bh\ufeffi\U000e0041j\x1b[31mk\u061cl"


def _acts(character: str) -> bool:
    """Tell whether a terminal or a viewer may act on a character."""
    return character not in "\n\t" and (
        unicodedata.category(character) in {"Cc", "Zl", "Zp", "Cs"}
        or unicodedata.bidirectional(character) in {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI", "BN"}
        or character in "\u200e\u200f\u061c"
    )


@pytest.mark.row("D41")
def test_every_character_that_acts_is_escaped() -> None:
    """All controls, separators of lines and marks of direction of Unicode are written out; joiners of scripts and emoji stay."""
    every = [chr(code) for code in range(sys.maxunicode + 1)]
    acting = [one for one in every if _acts(one)]

    assert [one for one in acting if clean(one) == one and unicodedata.category(one) not in {"Cn", "Lo"} and one not in "\u200c\u200d"
            and unicodedata.bidirectional(one) != "BN"] == []  # fmt: skip
    assert clean("\u202e\u2028\U000e0041\x9b") == "\\u202e\\u2028\\U000e0041\\x9b"
    assert clean("é Ω ع \u200d 👩\u200d💻") == "é Ω ع \u200d 👩\u200d💻"


def hostile_queue(backend: Client) -> str:
    """Fill a queue, a dead letter and a worker with hostile characters; return the id of the dead letter."""
    mail = Queue[object](backend, "mail", lease_ms=2000)
    for _ in range(2):
        mail.push({HOSTILE: HOSTILE}, headers={"x": HOSTILE})
    [message] = mail.pull()
    message.dead(HOSTILE)
    plant_worker(backend, json.dumps({"host": HOSTILE, "pid": 7}, ensure_ascii=False).encode())
    return message.id


def plant_worker(backend: Client, facts: bytes) -> None:
    """Register a worker that says *facts* of itself."""
    keys = backend.keys("mail")
    backend.announce(keys)
    backend.execute("ZADD", keys.workers, "9000000000000", "w" * 24)
    backend.execute("HSET", keys.leased("w" * 24), "\tturn", "0", "\tabout", facts, "\tlease", "1000")


def test_status_tells_a_worker_that_is_silent(shell: Shell, backend: Client) -> None:
    """`status` says of a worker whose leases have ended since when; of one that lives it says nothing of the kind."""
    plant_worker(backend, json.dumps({"host": "web-3", "pid": 7}).encode())
    assert "silent" not in on_terminal(shell, "status", expected={0, 8})

    ended = int((datetime.now(UTC) - timedelta(minutes=12, seconds=30)).timestamp() * 1000)
    keys = backend.keys("mail")
    backend.execute("ZADD", keys.workers, str(ended), "w" * 24, key=keys.workers)

    assert "web-3:7  serves mail  holds 0 jobs  silent: lease ended 12 m ago" in plain(
        on_terminal(shell, "status", expected={0, 8})
    )


@pytest.mark.row("D41")
def test_no_payload_reaches_the_terminal_as_it_is(shell: Shell, backend: Client) -> None:
    """A body, a header, an error and a worker full of hostile characters: none is printed, in whatever form."""
    dead_letter = hostile_queue(backend)
    printed = {}
    for command in (("job", "show", dead_letter), ("job", "list"), ("queue", "show", "mail"), ("status",)):
        for form in ([], ["--json"]):
            result = CliRunner().invoke(cli, [*command, *form, "--url", shell.url or ""])
            assert result.exit_code in {0, 8}, result.output
            printed[*command, *form] = result.output
    for command in (("job", "show", dead_letter), ("status",)):
        text = on_terminal(shell, *command, expected={0, 8}).replace("\r\n", "\n")
        printed[*command, "on a terminal"] = re.sub(r"\x1b\[[0-9;]*m", "", text)

    assert all(printed.values())
    assert {
        name: [ascii(one) for one in text if _acts(one)] for name, text in printed.items() if any(map(_acts, text))
    } == {}


@pytest.mark.row("D41")
def test_no_payload_reaches_the_log_of_a_worker_as_it_is() -> None:
    """A traceback in the log of a worker keeps its lines, and no other character that acts."""
    record = logging.LogRecord("conveyor.worker", logging.ERROR, "", 1, "job failed:\n\t%s", (HOSTILE,), None)
    text = SafeFormatter("%(message)s").format(record)

    assert [ascii(one) for one in text if _acts(one)] == []
    assert text.startswith("job failed:\n\ta\\u202eb")


@pytest.mark.row("D42")
@pytest.mark.parametrize("damaged", [b"{", b"[1]", b"\xff", b'{"host":7}', b'{"host":"h","pid":[1]}', b"[" * 5000])
def test_a_worker_whose_record_is_damaged(shell: Shell, backend: Client, damaged: bytes) -> None:
    """`status` shows it as damaged, and everything else as ever."""
    push(backend, "mail", b"1")
    plant_worker(backend, damaged)

    [worker] = Admin(backend).workers()
    assert worker.host == "(damaged)"
    result = CliRunner().invoke(cli, ["status", "--json", "--url", shell.url or ""])
    assert result.exit_code in {0, 8}, result.output
    if damaged == b"{":
        assert "wwww (its registration is damaged)  serves mail" in on_terminal(shell, "status", expected={0, 8})


# -- topics -------------------------------------------------------------------------------------------------------


def test_topics_from_the_command_line(shell: Shell, backend: Client) -> None:
    """Queues subscribe and unsubscribe, messages are published with the ids of their copies, and the list counts all of it."""
    assert shell.run("topic", "list").stdout == ""
    assert shell.run("topic", "subscribe", "user.created", "emails", "audit").stdout == "2\n"
    assert shell.run("topic", "subscribe", "user.*", "all", "--json").stdout == (
        '{"schema": "conveyor/topic-subscribed@1", "topic": "user.*", "subscribed": 1}\n'
    )
    done = shell.run("topic", "publish", "user.created", '{"id": 7}', "--header", "a=b", "--priority", "3")
    assert (done.returncode, done.stderr) == (0, "")
    assert [one.partition(":")[0] for one in done.stdout.split(" ")] == ["all", "audit", "emails"]
    job = Admin(backend).job(done.stdout.split()[2])
    assert (job.payload, job.headers, job.priority) == ('{"id":7}', {"a": "b"}, 3)
    lines = shell.run("topic", "publish", "user.created", "-", stdin='1\n\n"two"\n').stdout.splitlines()
    assert [len(line.split()) for line in lines] == [3, 3]
    assert shell.run("topic", "publish", "order.created", "1").stdout == "\n"
    assert shell.run("topic", "publish", "order.created", "1", "--id", "own").returncode == 0
    assert shell.run("topic", "list").stdout.splitlines() == [
        "order.created\t\t2\t2", "user.*\tall\t0\t0", "user.created\taudit emails\t3\t0",
    ]  # fmt: skip
    listed = json.loads(shell.run("topic", "list", "--json").stdout)
    assert listed["schema"] == "conveyor/topics@1"
    assert listed["topics"][2] == {
        "name": "user.created", "subscribers": ["audit", "emails"], "published": 3, "nobody": 0,
    }  # fmt: skip
    assert shell.run("topic", "unsubscribe", "user.created", "emails", "nobody").stdout == "1\n"
    for queue in ("all", "audit", "emails"):
        assert Admin(backend).purge(queue) == 3
    assert shell.run("queue", "delete", "all", "--yes").returncode == 0
    assert "user.*" not in shell.run("topic", "list").stdout


def test_bad_topics_from_the_command_line(shell: Shell, backend: Client) -> None:
    """Names, patterns, values and options that do not fit end with 2 and say why, and nothing is stored."""
    for words, text in (
        (("subscribe", "a..b", "q"), "words"),
        (("subscribe", "a.b", "no queue"), "Invalid queue name"),
        (("subscribe", "a.b"), "QUEUE"),
        (("publish", "a.*", "1"), "is a pattern"),
        (("publish", "a.b", "{bad"), "not JSON"),
        (("publish", "a.b", "1", "--delay", "soon"), "--delay"),
        (("publish", "a.b", "-", "--id", "x"), "--id"),
    ):
        done = shell.run("topic", *words)
        assert (done.returncode, done.stdout) == (2, ""), words
        assert text in done.stderr, words
    assert shell.run("topic", "list").stdout == ""
    assert backend.queues() == []


def test_what_waits_and_long_names_fit_a_terminal(shell: Shell, backend: Client) -> None:
    """Jobs that wait in a group have a column of their own, and the table of queues is no wider than the terminal."""
    long = "tenant-and-its-name-" * 4 + "end"
    push(backend, "mail", b"1", b"2", group="acme")
    push(backend, long, b"1")
    ClientWorker(backend, "mail").take()

    lines = plain(on_terminal(shell, "status", expected={0, 8}, columns=90)).splitlines()

    heading = next(line for line in lines if line.startswith("QUEUE"))
    rows = lines[lines.index(heading) + 1 :][:2]
    assert all(len(row) <= 90 for row in rows)
    assert re.match("….*-end ", rows[1])
    assert dict(zip(heading.split(), rows[0].split(), strict=False))["WAITING"] == "1"


def test_a_time_alone_is_of_the_last_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """An instant of the last 24 hours is shown by its time, also across midnight, and `--since` reads that time back as the same."""
    now = datetime(2026, 5, 2, 0, 10, tzinfo=UTC).astimezone()

    class Night(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return now.astimezone(tz)

    monkeypatch.setattr("conveyor.cli.output.datetime", Night)
    monkeypatch.setattr("conveyor.cli.filters.datetime", Night)
    for ago in (timedelta(minutes=1), timedelta(minutes=30), timedelta(hours=23, minutes=58)):
        assert instant("--since", clock_time(now - ago)) == now - ago
    assert len(clock_time(now - timedelta(hours=24))) > len("00:10")
