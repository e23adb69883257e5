"""`conveyor config`, `conveyor bench` and `conveyor job export`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from conveyor import Conveyor
from conveyor.cli import main
from support.manual_worker import drain

APP = """
import os

from conveyor import Conveyor

app = Conveyor(os.environ["CONVEYOR_URL"], namespace="shop")


@app.task(name="send", retry=1)
async def send(to: str) -> None: ...
"""


@pytest.fixture
def project(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONVEYOR_URL", url)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "configured_mail", raising=False)
    (tmp_path / "configured_mail.py").write_text(APP)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.conveyor]\napp = "configured_mail:app"\nthreads = 4\nprocesses = 2\n'
    )
    return tmp_path


def _run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(words) == code, capsys.readouterr()
    return capsys.readouterr().out


def test_each_setting_has_the_source_that_counts(
    project: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The environment counts before the file, the code of the app before the default, and a secret is not shown."""
    monkeypatch.setenv("CONVEYOR_PROCESSES", "3")
    monkeypatch.setenv("CONVEYOR_DASHBOARD_AUTH", "ada:secret-of-ada")
    document = json.loads(_run(capsys, "config", "show", "--json"))
    found = {one["name"]: (one["value"], one["source"]) for one in document["settings"]}
    assert found["app"] == ("configured_mail:app", "pyproject.toml")
    assert found["url"] == (url, "CONVEYOR_URL")
    assert found["namespace"] == ("shop", "code of configured_mail:app")
    assert found["worker --threads"] == ("4", "pyproject.toml")
    assert found["worker --processes"] == ("3", "CONVEYOR_PROCESSES")
    assert found["worker --concurrency"] == ("100", "default")
    assert found["dashboard"] == ("•••", "CONVEYOR_DASHBOARD_AUTH")
    assert "namespace\tshop\t" in _run(capsys, "config", "show")


def test_a_check_names_what_does_not_hold(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A variable that is misspelt is a warning; a value that cannot be read and a server that is away are problems."""
    monkeypatch.setenv("CONVEYOR_CONCURENCY", "3")
    assert "Did you mean 'CONVEYOR_CONCURRENCY'?" in _run(capsys, "config", "check")
    monkeypatch.setenv("CONVEYOR_GRACE", "5s")
    monkeypatch.setenv("CONVEYOR_THREADS", "many")
    assert "problem\tInvalid value for '--threads'" in _run(capsys, "config", "check", code=8)
    monkeypatch.delenv("CONVEYOR_THREADS")
    (project / "pyproject.toml").unlink()
    monkeypatch.setenv("CONVEYOR_URL", "redis://ada:lovelace@127.0.0.1:1/0")
    document = json.loads(_run(capsys, "config", "check", "--json", code=8))
    assert not document["holds"]
    assert "E01" in document["findings"][-1]["text"]
    assert "lovelace" not in json.dumps(document)


@pytest.fixture
def app(project: Path) -> Iterator[Any]:
    import configured_mail  # type: ignore[import-not-found]

    yield configured_mail.app
    drain(configured_mail.app)
    configured_mail.app.close()


def test_an_export_has_every_job_with_its_arguments(app: Conveyor, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is a document of its own, also beyond a page; a filter chooses, and nothing is changed."""
    ids = [job.id for job in app.enqueue_many(app.tasks["send"].s(f"{at}@b.c") for at in range(700))]
    app.tasks["send"].options(delay="1h", tags=["vip"]).enqueue("later@b.c")
    lines = [json.loads(line) for line in _run(capsys, "job", "export").splitlines()]
    assert {one["schema"] for one in lines} == {"conveyor/job@1"}
    assert {one["job"]["id"] for one in lines} >= set(ids)
    assert json.loads(next(one["job"]["payload"] for one in lines if one["job"]["id"] == ids[5])) == {"to": "5@b.c"}
    (vip,) = _run(capsys, "job", "export", "tag:vip").splitlines()
    assert json.loads(vip)["job"]["status"] == "scheduled"
    by_options = _run(capsys, "job", "export", "--tag", "vip", "--state", "scheduled", "--since", "1h")
    assert by_options.splitlines() == [vip]
    assert len(app.queue("default")) == 701


def test_a_bench_measures_and_leaves_no_key_for_long(
    url: str, redis: Redis, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It prints its figures with their ratios, and all keys of its queue have a time to live."""
    monkeypatch.setattr("conveyor.cli.bench.SINGLE", 5)
    document = json.loads(_run(capsys, "bench", "--url", url, "--jobs", "1000", "--json"))
    figures = {one["name"]: one for one in document["figures"]}
    assert figures["drain"]["value"] > 0
    assert figures["drain"]["ratio"] == figures["drain"]["value"] / figures["drain"]["plain"]
    assert all(redis.ttl(key) > 0 for key in redis.scan_iter("conveyor:{bench-*"))


@pytest.mark.parametrize("command", ["bench", "metrics", "topic list"])
def test_a_server_that_is_away_is_told_alike(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is 3 whatever the command, and no password is shown."""
    assert main([*command.split(), "--url", "redis://ada:lovelace@127.0.0.1:1"]) == 3
    printed = capsys.readouterr()
    assert "E01" in printed.err or "Redis does not answer" in printed.err
    assert "lovelace" not in printed.out + printed.err


def test_a_kind_of_failure_that_is_not_there(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is that of everything that is not found."""
    assert main(["failures", "show", "f00", "--url", url]) == 5
    assert "No kind of failure" in capsys.readouterr().err
