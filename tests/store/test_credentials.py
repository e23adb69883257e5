"""Credentials that an app asks for at each connection."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from redis.credentials import UsernamePasswordCredentialProvider

from conveyor import Conveyor
from conveyor.errors import ConfigurationError, StoreUnavailable
from support.running_worker import working
from support.shell import Shell

APP = """
import os
from conveyor import Conveyor
app = Conveyor(os.environ["SERVER"], credentials=lambda: ("worker", os.environ["TOKEN"]))
@app.task(name="say")
async def say() -> str:
    return "said"
"""


@pytest.mark.row("A44")
async def test_tokens_are_asked_for_at_each_connection(start_server: Any) -> None:
    """Rotated and cut off, programs and workers log in again with the token of then; a source that fails is tried again."""
    server, tokens, token = start_server(), itertools.count(), ["", ""]

    def rotate() -> None:
        token[:] = token[1], f"token-{next(tokens)}"
        client.execute_command("ACL", "SETUSER", "worker", "reset", "on", f">{token[1]}", "~*", "&*", "+@all")
        client.execute_command("CLIENT", "KILL", "USER", "worker")

    asked: list[int] = []

    def current() -> tuple[str, str]:
        asked.append(1)
        if len(asked) % 4 == 0:
            raise RuntimeError("the service of tokens is busy")
        return "worker", token[1]

    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "worker", "on")
        rotate()
        app = Conveyor(f"unix://{server.socket}?db=0", credentials=current)

        @app.task
        async def say(n: int) -> int:
            return n

        async with working(app):
            for n in range(3):
                assert await (await say.aenqueue(n)).aresult(timeout="60s") == n
                rotate()
            assert await (await say.aenqueue(9)).aresult(timeout="60s") == 9
        await app.aclose()
    assert len(asked) > 3


def test_a_supervisor_logs_in_with_them(start_server: Any, tmp_path: Path) -> None:
    """`conveyor worker` asks the app's function too: its guard of leases has connections of its own."""
    server, shell = start_server(), Shell(tmp_path)
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "worker", "on", ">t1", "~*", "&*", "+@all")
        client.execute_command("ACL", "SETUSER", "default", "resetpass", "off")
    shell.write("shop.py", APP)
    done = shell.run("worker", "shop:app", "--burst", "-v", SERVER=f"unix://{server.socket}?db=0", TOKEN="t1")
    assert done.returncode == 0, done.stderr
    assert "lease guard is connected" in done.stderr
    assert "t1" not in done.stderr


def test_what_gives_no_credentials_is_refused(start_server: Any) -> None:
    """A provider of redis-py will do; an async function, a text, and a URL with a password of its own do not."""
    server = start_server()
    url = f"unix://{server.socket}?db=0"
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "worker", "on", ">t1", "~*", "&*", "+@all")
    with Conveyor(url, credentials=UsernamePasswordCredentialProvider("worker", "t1")) as app:
        assert app.ping() > 0
        assert app.client.execute("ACL", "WHOAMI") == b"worker"

    async def later() -> str:
        return "t1"

    for wrong in (later, "t1", object()):
        with pytest.raises(ConfigurationError, match="credentials"):
            Conveyor(url, credentials=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Leave one out"):
        Conveyor("redis://ada:secret@127.0.0.1:1/0", credentials=lambda: "t1").ping()
    with Conveyor(url, credentials=lambda: 5) as app, pytest.raises(ConfigurationError, match="of type int"):  # type: ignore[arg-type,return-value]
        app.ping()
    with (
        Conveyor(url, credentials=lambda: 1 / 0, timeout="200ms") as app,  # type: ignore[arg-type,return-value]
        pytest.raises(
            StoreUnavailable, match=r"Cannot log in .*: credentials= failed: ZeroDivisionError: division by zero\.$"
        ),
    ):
        app.ping()
