"""Commands that choose jobs by tag and filter: what they choose, what they show, and that they may be interrupted."""

from __future__ import annotations

import json
import signal

import pytest

from conveyor.cli import main
from conveyor.jobs.app import Conveyor
from support.app_fixtures import blocking_app  # noqa: F401
from support.manual_worker import ManualWorker
from support.shell import Shell
from support.terminal import on_terminal, plain

pytestmark = pytest.mark.leaves_keys("jobs are pushed here to be chosen")


def dead(app: Conveyor, count: int, *, tags: tuple[str, ...] = ("a",)) -> list[str]:
    """Make dead letters of a task; return their ids."""
    pay = app.external_task("shop.pay")
    app.enqueue_many(pay.options(tags=tags).s(n) for n in range(count))
    manual = ManualWorker(app)
    ids = manual.take(count)
    for id_ in ids:
        manual.dead(id_, None)
    manual.leave()
    return ids


def test_tags_of_pushed_messages_are_chosen(shell: Shell, app: Conveyor) -> None:
    """`push --tag` gives tags; `job list`, `queue show`, `job cancel` and `job delete` choose by them, and show counts before they ask."""
    one, two = (
        shell.run("push", "orders", str(n), "--tag", "order:1", "--tag", f"n:{n}").stdout.strip() for n in (1, 2)
    )
    shell.run("push", "orders", "3")

    listed = [shell.run("job", "list", "-q", "--tag", tag).stdout.split() for tag in ("order:1", "n:2", "order:2")]
    shown = json.loads(shell.run("queue", "show", "orders", "--tag", "order:1", "--json").stdout)
    dry = shell.run("job", "cancel", "--tag", "order:1", "--dry-run")
    unasked = shell.run("job", "delete", "--tag", "n:1")
    details = shell.run("job", "show", one).stdout

    assert listed == [sorted([one, two]), [two], []]
    assert shown["counts"] == {"leased": 0, "ready": 2, "waiting": 0, "scheduled": 0, "dead": 0}
    assert (dry.returncode, dry.stdout, "Cancel 2 jobs (2 ready)?" in dry.stderr) == (0, "", True)
    assert (unasked.returncode, "Delete 1 job (1 ready) permanently?" in unasked.stderr) == (6, True)
    assert "tags\torder:1, n:1\n" in details
    assert app.count_jobs(tag="order:1") == 2
    assert shell.run("job", "delete", "--tag", "n:1", "--yes").stdout.split("\t")[:2] == [one, "deleted"]
    assert "1 job cancelled." in plain(on_terminal(shell, "job", "cancel", "--tag", "order:1", "--yes"))
    assert app.count_jobs(tag="order:1") == 0
    assert app.count_jobs(queue="orders") == 1


def test_jobs_of_a_tag_are_retried(shell: Shell, app: Conveyor) -> None:
    """`job retry --tag` puts dead ones back, and makes scheduled ones ready when they are asked for."""
    dead(app, 2)
    orders = app.queue("orders")
    orders.push(1, delay="1h", tags=["a"])

    assert shell.run("job", "retry", "--tag", "a", "--yes").stdout.count("\tretried\t") == 2
    assert app.count_jobs(tag="a", state="scheduled") == 1
    assert shell.run("job", "retry", "--tag", "a", "--state", "scheduled", "--yes").stdout.count("\tretried\t") == 1
    assert app.count_jobs(tag="a", state="ready") == 3


def test_a_redrive_keeps_its_rate(shell: Shell, app: Conveyor) -> None:
    """`queue redrive --rate` puts the chosen back, and pauses as long as the rate says."""
    dead(app, 30)
    dead(app, 1, tags=("b",))

    done, waited = shell.run_waiting("queue", "redrive", "default", "--tag", "a", "--rate", "10/s", "--yes")

    assert (done.returncode, done.stdout) == (0, "30\n")
    assert 2.9 <= waited <= 3.1
    assert (app.count_jobs(tag="a", state="ready"), app.count_jobs(tag="b", state="dead")) == (30, 1)
    for rate in ("fast", "0/s", "10", "10/0s"):
        refused = shell.run("queue", "redrive", "default", "--rate", rate, "--yes")
        assert (refused.returncode, '"100/s"' in refused.stderr) == (2, True)


@pytest.mark.row("D341")
def test_an_interrupted_redrive_goes_on(
    app: Conveyor, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ends a redrive between two steps and says how far it was; the same command puts back the rest, none twice."""
    ids = dead(app, 12)
    words = ["--url", url, "queue", "redrive", "default", "--tag", "a", "--yes", "--rate"]
    pauses: list[float] = []

    def interrupt(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 5:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("conveyor.messaging.selection.time.sleep", interrupt)
        code = main([*words, "20/m"])
    said = capsys.readouterr().err
    put_back = app.count_jobs(tag="a", state="ready")

    assert (code, put_back, "Stopped: 4 of 12 put back." in said) == (130, 4, True)
    assert (main([*words, "1000/s"]), capsys.readouterr().out) == (0, "8\n")
    ready = [job.id for job in app.jobs(tag="a", state="ready")]
    assert (len(ready), sorted(ready)) == (12, sorted(f"default:{id_}" for id_ in ids))


def test_a_filter_in_one_word(shell: Shell, app: Conveyor) -> None:
    """A filter of several terms may be one word of the shell; a word of one term with blanks in it is its value."""
    one, two = (f"default:{id_}" for id_ in dead(app, 2))
    (three,) = (f"default:{id_}" for id_ in dead(app, 1, tags=("of a lot",)))
    app.queue("orders").push({"text": "no host: x"})

    def listed(*words: str) -> list[str]:
        return sorted(shell.run("job", "list", "-q", *words).stdout.split())

    both = sorted([one, two])
    assert listed("state:dead task:shop.* -tag:of") == sorted([one, two, three])
    assert listed("state:dead tag:a") == listed("state:dead", "tag:a") == listed("tag:a -queue:orders") == both
    assert listed("tag:of a lot") == listed('state:dead tag:"of a lot"') == [three]
    assert len(listed("no host: x")) == len(listed("body:no host: x")) == 1
    assert shell.run("job", "list", "state:dead age:soon").returncode == 2
    exported = shell.run("job", "export", "state:dead tag:a").stdout.splitlines()
    assert len(exported) == 2


def test_a_misspelt_field_of_a_filter_in_one_word_is_told(shell: Shell, app: Conveyor) -> None:
    """A second field that there is not is an error with its column, and no part of the value before it; a text keeps its colons."""
    (one,) = (f"default:{id_}" for id_ in dead(app, 1, tags=("at 10:30 of a lot",)))
    for words, column, near in (
        ("state:dead tsk:mail", 12, "task:"), ("task:mail.* foo:bar", 13, "Known: state"), ("error:timed out tsk:mail", 17, "task:"),
        ("tag:a -qeue:mail", 7, "queue:"), ("older:2h state.x:dead", 10, "state:"),
    ):  # fmt: skip
        refused = shell.run("job", "list", words)
        assert (refused.returncode, refused.stdout) == (2, ""), words
        assert f"Column {column} of the filter: There is no field" in refused.stderr, refused.stderr
        assert near in refused.stderr
    assert shell.run("job", "list", "-q", "tag:at 10:30 of a lot").stdout.split() == [one]
    assert shell.run("job", "list", "-q", "error:no url:http there").stdout == ""


@pytest.mark.parametrize("action", ["retry", "cancel", "delete"])
def test_a_dry_run_says_what_the_action_does_then(shell: Shell, app: Conveyor, action: str) -> None:
    """`--dry-run` of ids prints the outcomes and has the exit code of the action that follows it, and changes nothing."""
    [dead_id] = dead(app, 1, tags=())
    orders = app.queue("orders")
    scheduled, ready = orders.push(1, delay="1h"), orders.push(2)
    [leased] = orders.pull(1)
    ids = [f"default:{dead_id}", scheduled, leased.id, "default:nowhere"]
    assert leased.id == ready

    def run(*words: str) -> tuple[int, dict[str, str], bool]:
        done = shell.run("job", action, *words, "--json")
        document = json.loads(done.stdout)
        outcomes = {one["id"]: one["outcome"] for one in document["jobs"]}
        assert document["schema"] == f"conveyor/{action}@1"
        return done.returncode, outcomes, document["dry_run"]

    before = [app.job(one).status() for one in ids[:3]]
    for chosen in (ids, ids[:3], ids[:1]):
        foreseen = run(*chosen, "--dry-run")
        assert foreseen[2]
    assert [app.job(one).status() for one in ids[:3]] == before
    code, outcomes, _ = run(*ids, "--dry-run")
    assert run(*ids, "--yes") == (code, outcomes, False)
    leased.ack()


def test_every_dry_run_is_a_document(shell: Shell, app: Conveyor) -> None:
    """With `--json`, a dry run of what options choose, of a kind of failures and of a schedule prints one document too."""
    dead(app, 2)
    app.schedules.put("nightly", app.external_task("shop.pay").s(), every="1h")
    fingerprint = shell.run("failures", "list").stdout.split("\t")[0]
    by_options = json.loads(shell.run("job", "retry", "--tag", "a", "--dry-run", "--json").stdout)
    assert (by_options["dry_run"], by_options["count"], by_options["states"]) == (True, 2, {"dead": 2})
    for words in (
        ["failures", "retry", fingerprint],
        ["schedule", "delete", "nightly"],
        ["job", "cancel", "--tag", "x"],
    ):
        done = shell.run(*words, "--dry-run", "--json")
        assert (done.returncode, json.loads(done.stdout)["dry_run"]) == (0, True)
    assert app.count_jobs(tag="a", state="dead") == 2
    assert not json.loads(shell.run("schedule", "delete", "nightly", "--yes", "--json").stdout)["dry_run"]
