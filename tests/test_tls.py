"""The whole way over TLS: blocking and awaitable calls, a worker, a result."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from conveyor.app import Conveyor
from conveyor.errors import StoreUnavailable
from server import Server, find_binary
from working import working


@pytest.fixture
def secure_url(start_server: Callable[..., Server], tmp_path: Path) -> str:
    """The URL of a server that speaks TLS with a certificate of its own."""
    if find_binary("redis7") is None or shutil.which("openssl") is None:
        pytest.skip("needs a Redis 7 that speaks TLS, and openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_server(
        "--bind", "127.0.0.1", "--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key),
        "--tls-auth-clients", "no", name="redis7",
    )  # fmt: skip
    return f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}"


async def test_jobs_and_messages_travel_over_tls(secure_url: str) -> None:
    """Pushes, bulk, a worker, results by push and message consumers work over `rediss://`."""
    app = Conveyor(secure_url)

    @app.task
    async def add(a: int, b: int) -> int:
        return a + b

    async with working(app):
        jobs = [await add.aenqueue(n, n) for n in range(20)]
        assert [await job.aresult(timeout=10) for job in jobs] == [2 * n for n in range(20)]

    def blocking() -> list[str]:
        queue = app.queue("orders")
        queue.push_many({"text": "x" * 1000, "n": n} for n in range(3000))
        found = []
        for message in queue.pull(n=3, wait="5s"):
            found.append(message.body["n"])
            message.ack()
        assert queue.purge() == 2997
        return found

    assert await asyncio.to_thread(blocking) == [0, 1, 2]
    await app.aclose()


def test_a_server_of_unknown_origin_is_refused(secure_url: str) -> None:
    """A certificate that nobody vouches for is an error, not a warning."""
    app = Conveyor(secure_url.partition("?")[0])
    app.backend.patience = 0.2

    @app.task
    async def never() -> None: ...

    with pytest.raises(StoreUnavailable, match=r"(?i)certificate"):
        never.enqueue()
    app.close()
