"""`conveyor limits`: what it shows, changes and gives back."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from conveyor.cli import main

APP = """
from conveyor import Concurrency, Conveyor, Rate
app = Conveyor()
@app.task(name="send", queue="mail", limits=[Rate(100, "1s"), Concurrency(2, by="tenant")])
def send(tenant: str) -> None: ...
"""


def write_app(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the app as a module that this process can import."""
    (folder / f"{name}.py").write_text(APP)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.leaves_keys("the limits of its queue are kept")
def test_limits_are_listed_set_and_reset(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A change of a rate, or of one key of a limit, shows in the list until it is reset; what fits no limit is refused."""
    write_app("limited_shop", tmp_path, monkeypatch)
    monkeypatch.setenv("CONVEYOR_URL", url)

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["limits", *words, "-A", "limited_shop"])  # in this process, which is faster
        return code, *capsys.readouterr()

    def limits(*words: str) -> Any:
        code, printed, said = run(*words, "--json")
        assert code == 0, said
        return json.loads(printed)

    limits("set", "mail", "500/1m")
    limits("set", "send", "5", "--name", "send.concurrency.tenant", "--key", "acme")
    document = limits("list", "mail")
    assert document["schema"] == "conveyor/limits@1"
    found = {
        (one["name"], one["key"]): (one["limit"], one["declared"], one["overridden"]) for one in document["limits"]
    }
    assert found["send.rate", None] == ("500/1m", "100/1s", True)
    assert found["send.concurrency.tenant", None] == ("2", "2", False)
    assert found["send.concurrency.tenant", "acme"][0] == "5"
    assert limits("reset", "mail")["reset"] == 2
    assert not any(one["overridden"] for one in limits("list")["limits"])

    for words, why in (
        (("set", "mail", "many"), "A limit is a rate such as"), (("set", "mail", "5", "--name", "no"), "has no limit 'no'"),
        (("set", "nowhere", "5"), "No queue or task"), (("reset", "mail", "no"), "has no limit 'no'"),
    ):  # fmt: skip
        code, _, said = run(*words)
        assert code in {2, 5}
        assert why in said


@pytest.mark.leaves_keys("the limits of its queue are kept")
def test_limits_of_another_namespace_are_its_own(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --namespace or --url the limits there are listed and changed, and never those of the app's own place."""
    write_app("placed_shop", tmp_path, monkeypatch)
    monkeypatch.setenv("CONVEYOR_URL", url)

    def limits(*words: str) -> Any:
        code = main(["limits", *words, "-A", "placed_shop", "--json"])
        printed, said = capsys.readouterr()
        assert code == 0, said
        return json.loads(printed)

    limits("set", "mail", "500/1m")
    limits("set", "mail", "7/1m", "--namespace", "other")

    def rates(*words: str) -> list[str]:
        return [one["limit"] for one in limits("list", "mail", *words)["limits"] if one["name"] == "send.rate"]

    assert (rates(), rates("--namespace", "other")) == (["500/1m"], ["7/1m"])
    assert limits("reset", "mail", "--namespace", "other")["reset"] == 1
    assert rates() == ["500/1m"]
    monkeypatch.setenv("CONVEYOR_URL", "unix:///nowhere/redis.sock")
    assert rates("--url", url) == ["500/1m"]
    assert os.environ["CONVEYOR_URL"] == "unix:///nowhere/redis.sock"
