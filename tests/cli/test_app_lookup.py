"""The command line and the app: the look-up of the app, the arguments of `enqueue`, the checks of `worker`."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import redis as redis_py

from conveyor import Conveyor
from conveyor.admin.admin import Admin
from conveyor.store.client.client import Client
from support.client_worker import ClientWorker, wait_for_job
from support.shell import Shell
from testbed.server_process import Server

pytestmark = pytest.mark.leaves_keys("jobs are enqueued here to be looked at")

JOBS = """
import datetime
from conveyor import Conveyor
app = Conveyor()

@app.task
async def greet(name: str, excited: bool = False) -> str:
    return f"Hello {name}{'!' if excited else '.'}"

@app.task(queue="mail")
def remind(when: datetime.datetime, times: int = 1) -> None: ...
"""


@pytest.fixture
def shell(url: str, tmp_path: Path) -> Shell:
    shell = Shell(tmp_path, url)
    shell.write("jobs.py", JOBS)
    return shell


# -- finding the app ----------------------------------------------------------------------------------------------


def test_app_is_found_in_the_order_of_settings(shell: Shell, backend: Client) -> None:
    """The flag wins over the environment, and that over pyproject.toml; a module with one app needs no object."""
    shell.write("pyproject.toml", '[tool.conveyor]\napp = "jobs:app"\n')
    assert shell.run("enqueue", "greet", "name=Ada").returncode == 0
    assert shell.run("enqueue", "greet", "name=Ada", CONVEYOR_APP="nope").returncode == 4
    assert shell.run("enqueue", "greet", "name=Ada", "--app", "jobs", CONVEYOR_APP="nope").returncode == 0
    assert Admin(backend).queue("default").ready == 2


def test_pyproject_names_the_server(shell: Shell, backend: Client) -> None:
    """[tool.conveyor] url counts for commands and for the app where no variable and no flag says other."""
    shell.write("pyproject.toml", f'[tool.conveyor]\nurl = "{shell.url}"\n')
    shell.url = None

    assert shell.run("push", "mail", "1").returncode == 0
    assert shell.run("enqueue", "greet", "name=Ada", "-A", "jobs").returncode == 0
    assert [info.name for info in Admin(backend).queues()] == ["default", "mail"]


def test_namespace_of_the_app_is_used(shell: Shell, backend: Client) -> None:
    """Commands look where the app's workers look; a flag that contradicts its code is refused, not ignored."""
    shell.write("shop.py", JOBS.replace("Conveyor()", 'Conveyor(namespace="shop")'))
    assert shell.run("enqueue", "greet", "name=Ada", CONVEYOR_APP="shop").returncode == 0

    assert shell.run("queue", "list", CONVEYOR_APP="shop").stdout.startswith("default\t1")
    assert shell.run("queue", "list").stdout == ""
    refused = shell.run("enqueue", "greet", "name=Ada", "--namespace", "other", CONVEYOR_APP="shop")
    assert refused.returncode == 2
    assert "'shop'" in refused.stderr


@pytest.mark.parametrize(
    ("reference", "code", "words"),
    [
        ("nope", "E08", ["No module named 'nope'", "Modules here: jobs.py", "Try:  conveyor worker jobs"]),
        ("jobs:nope", "E08", ["'jobs' has no 'nope'", "jobs:app"]),
        ("jobs:greet", "E08", ["is not an app"]),
        ("broken", "E08", ["ZeroDivisionError", "broken.py:3"]),
        ("gone", "E08", ["No module named 'not_installed'", "gone.py:1"]),
        ("wrong", "E08", ["SyntaxError", "wrong.py:1"]),
        ("leaving", "E08", ["SystemExit"]),
        ("empty", "E08", ["'empty' has no app", "jobs.py"]),
        ("pack.jobz", "E08", ["pack/jobs.py"]),
        ("two", "E09", ["two:app", "two:other"]),
        ("jobs.py", "E08", ["Try:  conveyor worker jobs\n"]),
        ("pack/jobs.py", "E08", ["Try:  conveyor worker pack.jobs\n"]),
        ("pack", "E08", ["'pack' has no app", "Try:  conveyor worker pack.jobs\n"]),
        ("../jobs", "E08", ["is not a module"]),
    ],
)
def test_app_that_cannot_be_found(shell: Shell, reference: str, code: str, words: list[str]) -> None:
    """An error in the app is explained in one screen, with the names that exist nearby; the exit code is 4."""
    shell.write("broken.py", "import jobs\n\n1 / 0\n")
    shell.write("gone.py", "import not_installed\n")
    shell.write("wrong.py", "def\n")
    shell.write("leaving.py", "raise SystemExit(0)\n")
    shell.write("empty.py", "")
    shell.write("pack/__init__.py", "")
    shell.write("pack/jobs.py", JOBS)
    shell.write("two.py", "from conveyor import Conveyor\nfrom jobs import app\nother = Conveyor()\nsame = app\n")

    done = shell.run("worker", reference)

    assert done.returncode == 4
    assert done.stderr.startswith(f"error {code}  ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


@pytest.mark.parametrize("reference", ["pack.app", "app"])
def test_command_inside_a_package(shell: Shell, reference: str) -> None:
    """A command that is given inside the package of the app says where to give it, whichever way the app is named."""
    shell.write("pack/__init__.py", "")
    shell.write("pack/app.py", "from conveyor import Conveyor\napp = Conveyor(include=['pack.mail'])\n")
    shell.write("pack/mail.py", "from pack.app import app\n")

    done = Shell(shell.directory / "pack", shell.url).run("worker", reference)

    assert done.returncode == 4
    assert "No module named 'pack'" in done.stderr
    assert "importlib" not in done.stderr
    assert (
        f"This directory lies in the package 'pack'. Run the command above it:  cd {shell.directory}\n" in done.stderr
    )


def test_no_app_is_usage(shell: Shell) -> None:
    """Without any app the error lists the ways to name one, and the candidates nearby."""
    done = shell.run("worker")

    assert done.returncode == 2
    assert "CONVEYOR_APP" in done.stderr
    assert "jobs" in done.stderr


def test_unknown_setting_is_refused(shell: Shell) -> None:
    """A misspelt setting in pyproject.toml is named, not ignored."""
    shell.write("pyproject.toml", "[tool.conveyor]\nconcurency = 3\n")

    done = shell.run("status")

    assert done.returncode == 2
    assert "concurency" in done.stderr


# -- enqueue ------------------------------------------------------------------------------------------------------


def test_enqueue_converts_by_annotation(shell: Shell, backend: Client) -> None:
    """Words become what the annotations say, and the id alone is printed; --args takes the rest."""
    done = shell.run(
        "enqueue", "remind", "when=2026-01-01T09:00:00+00:00", "times=3", "--in", "10m", CONVEYOR_APP="jobs"
    )
    other = shell.run(
        "enqueue", "jobs.remind", "--args", '["2026-01-01T09:00:00Z", 2]', "--queue", "vip", "--priority", "5",
        "--id", "r-1", "--json", CONVEYOR_APP="jobs",
    )  # fmt: skip

    assert (done.returncode, other.returncode) == (0, 0)
    job = Admin(backend).job(done.stdout.strip())
    assert (job.task, job.queue, job.status) == ("jobs.remind", "mail", "scheduled")
    assert json.loads(job.payload or "")["times"] == 3
    assert json.loads(other.stdout) == {"schema": "conveyor/enqueued@1", "id": "r-1", "task": "jobs.remind"}
    assert (Admin(backend).job("r-1").queue, Admin(backend).job("r-1").priority) == ("vip", 5)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["greet", "nam=Ada"], 2, "Did you mean 'name'?"),
        (["greet"], 2, "name"),
        (["greet", "Ada"], 2, "name=value"),
        (["greet", "name=Ada", "excited=maybe"], 2, "excited"),
        (["remind", "when=tomorrow"], 2, "when"),
        (["greet", "name=Ada", "--args", "{"], 2, "--args is not JSON"),
        (["greet", "name=Ada", "--args", '{"name": "Bob"}'], 2, "twice"),
        (["greet", "name=Ada", "--in", "soon"], 2, "soon"),
        (["greet", "name=Ada", "--at", "2026-01-01T00:00:00"], 2, "E18"),
        (["greet", "name=Ada", "--timeout", "5s"], 2, "--wait"),
        (["gret", "name=Ada"], 5, "Did you mean 'greet'?"),
    ],
)
def test_bad_call_enqueues_nothing(shell: Shell, backend: Client, words: list[str], code: int, said: str) -> None:
    """A call that does not fit its task is refused with what would fit, and stores nothing."""
    done = shell.run("enqueue", *words, CONVEYOR_APP="jobs")

    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert backend.queues() == []


def test_enqueue_waits_for_the_result(shell: Shell, backend: Client) -> None:
    """With --wait the result is printed as JSON, the id on standard error."""
    process = shell.start("enqueue", "greet", "name=Ada", "--wait", CONVEYOR_APP="jobs")
    worker = ClientWorker(backend, "default")
    id_ = wait_for_job(worker)
    worker.succeed(id_, b'"Hello Ada."')
    out, err = process.communicate(timeout=60)

    assert (process.returncode, out) == (0, '"Hello Ada."\n')
    assert id_ in err


def test_failed_job_ends_with_7(shell: Shell, backend: Client) -> None:
    """With --wait a failed job ends with 7, its error and traceback on standard error."""
    process = shell.start("enqueue", "greet", "name=Ada", "--wait", CONVEYOR_APP="jobs")
    worker = ClientWorker(backend, "default")
    worker.fail(wait_for_job(worker), "no such user")
    out, err = process.communicate(timeout=60)

    assert (process.returncode, out) == (7, "")
    assert "Traceback: no such user" in err
    assert "error E24" in err
    assert "ValueError: no such user" in err


def test_waiting_too_long_ends_with_124(shell: Shell) -> None:
    """With --timeout waiting ends with 124, and the job goes on."""
    done = shell.run("enqueue", "greet", "name=Ada", "--wait", "--timeout", "200ms", CONVEYOR_APP="jobs")

    assert (done.returncode, done.stdout) == (124, "")
    assert done.stderr.endswith(
        "It is 'ready', and no worker takes queue 'default'. Start one:  conveyor worker jobs:app\n"
    )
    assert "was not cancelled" in done.stderr


def test_a_long_wait_says_what_is_known(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """`enqueue --wait` says after a while, once, that no worker takes the queue, and goes on waiting."""
    import sys

    from click.testing import CliRunner

    from conveyor.cli import cli, enqueue

    monkeypatch.setattr(enqueue, "SAY_AFTER", 0.1)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(shell.directory)
    monkeypatch.setenv("CONVEYOR_URL", shell.url or "")
    try:
        result = CliRunner().invoke(
            cli, ["enqueue", "greet", "name=Ada", "-A", "jobs", "--wait", "--timeout", "300ms"], obj={"verbose": False}
        )
    finally:
        sys.modules.pop("jobs", None)

    [line] = [line for line in result.stderr.splitlines() if "Still waiting" in line]
    assert "has not ended after 0.1 s. It is 'ready', and no worker takes queue 'default'." in line
    assert isinstance(result.exception, TimeoutError)


def test_interrupted_ends_with_130(shell: Shell, backend: Client) -> None:
    """Ctrl-C while waiting ends with 130 and no traceback."""
    process = shell.start("enqueue", "greet", "name=Ada", "--wait", CONVEYOR_APP="jobs")
    wait_for_job(ClientWorker(backend, "default"))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 130, err
    assert "Traceback" not in err


# -- worker -------------------------------------------------------------------------------------------------------


@pytest.mark.row("C12")
def test_worker_refuses_a_server_that_evicts(shell: Shell, start_server: object) -> None:
    """On a server that may delete jobs a worker does not start: exit 6, E10, and how to start anyway."""
    evicting = start_server("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")  # type: ignore[operator]

    done = shell.run("worker", "jobs", "--url", evicting.url)

    assert done.returncode == 6
    assert done.stderr.startswith("error E10")
    assert "--allow-eviction" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-q", "no queue"], "no queue"),
        (["-q", "mail:0"], "weight"),
        (["--grace", "soon"], "soon"),
        (["--processes", "0"], "processes"),
        (["--health-port", "mail"], "health-port"),
        (["--autoscale", "8..2"], "autoscale"),
        (["--autoscale", "2..8", "--burst"], "autoscale"),
        (["--label", "no label"], "label"),
    ],
)
def test_wrong_option_of_a_worker_is_usage(shell: Shell, words: list[str], said: str) -> None:
    """An option that means nothing is refused before anything starts."""
    done = shell.run("worker", "jobs", *words)

    assert done.returncode == 2
    assert said in done.stderr


def test_worker_settings_by_source(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor gets the flag, else the variable, else the value in pyproject.toml, else the default."""
    import sys

    from click.testing import CliRunner

    from conveyor.cli import cli
    from conveyor.worker.supervision import supervisor

    given: dict[str, object] = {}
    monkeypatch.setattr(supervisor, "run", lambda name, **options: given.update(options, name=name) or 0)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(shell.directory)
    monkeypatch.setenv("CONVEYOR_URL", shell.url or "")
    monkeypatch.setenv("CONVEYOR_THREADS", "3")
    monkeypatch.setenv("CONVEYOR_MAX_MEMORY", "1500MB")
    monkeypatch.setenv("CONVEYOR_LABELS", "gpu,eu")
    shell.write(
        "pyproject.toml",
        '[tool.conveyor]\napp = "jobs"\nprocesses = 4\nthreads = 2\nconcurrency = 7\nmax_jobs = 500\nqueues = {mail = 3, vip = 1}\nlabels = ["cpu"]\n',
    )
    try:
        result = CliRunner().invoke(cli, ["worker", "-c", "9", "--burst"], obj={"verbose": False})
    finally:
        sys.modules.pop("jobs", None)

    assert result.exit_code == 0, result.output
    reports = given.pop("reports")
    assert isinstance(reports, dict)
    assert [(path, callable(report)) for path, report in reports.items()] == [("/metrics", True), ("/load", True)]
    assert given == {
        "name": "jobs:app", "queues": {"mail": 3.0, "vip": 1.0}, "concurrency": 9, "threads": 3, "processes": 4,
        "burst": True, "grace": 30.0, "max_jobs": 500, "max_memory": 1_500_000_000, "verbose": False,
        "labels": ("gpu", "eu"), "autoscale": None, "health": None, "login": None, "reload": (),
    }  # fmt: skip


def test_push_to_a_plain_list_appends_the_document(shell: Shell, redis: redis_py.Redis) -> None:
    """`conveyor push` of an app that declares a plain list puts bare documents on that list, and takes no options there."""
    shell.write("lists.py", "from conveyor import Conveyor\napp = Conveyor()\napp.plain_list('raw')\n")
    done = shell.run("push", "raw", '{"id": 1}', "-A", "lists")
    lines = shell.run("push", "raw", "-", "-A", "lists", stdin='{"id": 2}\n3\n')
    refused = shell.run("push", "raw", "4", "--id", "own", "-A", "lists")

    assert [(one.returncode, one.stdout) for one in (done, lines)] == [(0, ""), (0, "")]
    assert redis.lrange("raw", 0, -1) == [b'{"id":1}', b'{"id":2}', b"3"]
    assert refused.returncode == 2
    assert "A plain list holds bare documents" in refused.stderr


def test_push_passes_the_middleware_of_the_app(shell: Shell, redis: redis_py.Redis) -> None:
    """`conveyor push` is a push of the app that it found: its middleware sees each message, and may change it."""
    shell.write(
        "traced.py",
        """
from conveyor import Conveyor, Middleware
app = Conveyor()
app.queue("mail")

@app.middleware
class Trace(Middleware):
    def push(self, outgoing):
        outgoing.headers["of"] = outgoing.queue
        outgoing.body = outgoing.body * 2
""",
    )
    for queue in ("mail", "undeclared"):
        done = shell.run("push", queue, "-", "-A", "traced", stdin='1\n"a"\n')
        assert done.returncode == 0, done.stderr
        with Conveyor(shell.url) as app:
            taken = app.queue(queue).pull(2)
            assert [(one.body, one.headers) for one in taken] == [(2, {"of": queue}), ("aa", {"of": queue})]
            for message in taken:
                message.ack()


def test_worker_waits_for_redis_and_says_so_once(shell: Shell, start_server: Callable[..., Server]) -> None:
    """A worker started while Redis is away says in one line what it waits for, blames no job, and works when Redis is there."""
    server = start_server()
    server.kill()
    shell.url = server.url
    worker = shell.start("worker", "jobs", "-q", "default", "--grace", "1s")
    assert worker.stderr is not None
    lines: list[str] = []
    for line in worker.stderr:
        lines.append(line)
        if "Waiting for it" in line:
            break
    server.start()
    done = shell.run("enqueue", "greet", "name=Ada", "--wait", "--timeout", "30s", CONVEYOR_APP="jobs")
    worker.send_signal(signal.SIGTERM)
    lines += worker.communicate(timeout=60)[1].splitlines(keepends=True)
    said = "".join(lines)

    assert (done.returncode, done.stdout) == (0, '"Hello Ada."\n'), said
    assert re.search(r"^\d\d:\d\d:\d\d WARNING Cannot reach Redis at \S+ .* Waiting for it\.$", said, re.MULTILINE)
    assert "Redis answers after" in said
    assert (said.count("Cannot"), said.count("Traceback")) == (1, 0)


# -- an app of several modules --------------------------------------------------------------------------------------

MODULE = """
from shop.app import app

@app.task
async def {name}() -> str:
    return "{name}"
"""


def write_shop(shell: Shell, include: str) -> None:
    shell.write("shop/__init__.py", "")
    shell.write("shop/app.py", f"from conveyor import Conveyor\napp = Conveyor(include={include})\n")
    for name in ("mail", "tasks/pdf", "tasks/thumbnails"):
        shell.write(f"shop/{name}.py", MODULE.format(name=name.rpartition("/")[2]))
    shell.write("shop/tasks/__init__.py", "")


@pytest.mark.parametrize(
    ("include", "flags", "variables"),
    [
        ('["shop.mail", "shop.tasks.*"]', [], {}),
        ('["shop.mail"]', ["--include", "shop.tasks.*"], {}),
        ("[]", [], {"CONVEYOR_INCLUDE": "shop.mail,shop.tasks.*"}),
    ],
)
def test_tasks_of_several_modules_are_known(
    shell: Shell, include: str, flags: list[str], variables: dict[str, str]
) -> None:
    """A worker and `enqueue` know the tasks of the modules that an app, a flag or a variable names, patterns too."""
    write_shop(shell, include)
    waiting = variables | ({"CONVEYOR_INCLUDE": "shop.tasks.*"} if flags else {})
    for name in ("mail.mail", "tasks.pdf.pdf", "tasks.thumbnails.thumbnails"):
        assert shell.run("enqueue", f"shop.{name}", "--app", "shop.app", **waiting).returncode == 0

    assert shell.run("worker", "shop.app", "--burst", *flags, **variables).returncode == 0
    listed = shell.run("job", "list", "--state", "done").stdout
    assert sorted(line.split("\t")[2] for line in listed.splitlines()) == [
        "shop.mail.mail", "shop.tasks.pdf.pdf", "shop.tasks.thumbnails.thumbnails",
    ]  # fmt: skip


def test_modules_of_tasks_are_named_when_none_is_known(shell: Shell) -> None:
    """A worker of an app without tasks says which modules beside it define some, and how to name them."""
    write_shop(shell, "[]")
    done = shell.run("worker", "shop.app")

    assert done.returncode == 2
    assert "E02" in done.stderr
    assert 'Conveyor(include=["shop.mail", "shop.tasks.pdf", "shop.tasks.thumbnails"])' in done.stderr
    assert "--include shop.mail --include shop.tasks.pdf" in done.stderr


@pytest.mark.parametrize(
    ("include", "code", "said"),
    [
        ('["shop.nothing"]', 4, "No module named 'shop.nothing'"),
        ('["shop.tasks.x*"]', 2, "no module matches 'shop.tasks.x*'"),
        ('"shop.mail"', 2, "include takes a list of modules"),
        ('["*.mail"]', 2, "must begin with the name of a package"),
    ],
)
def test_a_wrong_module_is_an_error(shell: Shell, include: str, code: int, said: str) -> None:
    """A module that is missing and a pattern that matches nothing stop a worker at its start, with the name."""
    write_shop(shell, include)
    done = shell.run("worker", "shop.app", "--burst")

    assert done.returncode == code, done.stderr
    assert said in done.stderr


def test_worker_runs_what_is_enqueued(shell: Shell) -> None:
    """A worker started on the command line runs a job that another command waits for, and ends with 0 when told to."""
    worker = shell.start("worker", "jobs", "-q", "default")
    done = shell.run("enqueue", "greet", "name=Ada", "excited=true", "--wait", "--timeout", "30s", CONVEYOR_APP="jobs")
    listed = shell.run("job", "list", "--state", "done")
    worker.send_signal(signal.SIGTERM)
    _, err = worker.communicate(timeout=60)

    assert (done.returncode, done.stdout) == (0, '"Hello Ada!"\n')
    assert listed.stdout.split("\t")[:4] == [done.stderr.splitlines()[0], "default", "jobs.greet", "done"]
    assert worker.returncode == 0, err
