"""`conveyor limits`: what it shows, changes and gives back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.shell import Shell

APP = """
from conveyor import Concurrency, Conveyor, Rate
app = Conveyor()
@app.task(name="send", queue="mail", limits=[Rate(100, "1s"), Concurrency(2, by="tenant")])
def send(tenant: str) -> None: ...
"""


@pytest.mark.leaves_keys("the limits of its queue are kept")
def test_limits_are_listed_set_and_reset(url: str, tmp_path: Path) -> None:
    """A change of a rate, or of one key of a limit, shows in the list until it is reset; what fits no limit is refused."""
    (tmp_path / "shop.py").write_text(APP)
    shell = Shell(tmp_path, url)

    def limits(*words: str) -> Any:
        done = shell.run("limits", *words, "-A", "shop", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

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
        done = shell.run("limits", *words, "-A", "shop")
        assert done.returncode in {2, 5}
        assert why in done.stderr
