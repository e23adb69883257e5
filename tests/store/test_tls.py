"""The whole way over TLS: blocking and awaitable calls, a worker, a result."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from conveyor.errors import StoreUnavailable
from conveyor.jobs.app import Conveyor
from support.running_worker import working
from testbed.server_groups import Node, free_port, wait_for
from testbed.server_process import Server, find_binary


@pytest.fixture
def identity(tmp_path: Path) -> tuple[str, ...]:
    """The options of a server that speaks TLS with a certificate of its own; the second of them is the certificate."""
    if find_binary("redis7") is None or shutil.which("openssl") is None:
        pytest.skip("needs a Redis 7 that speaks TLS, and openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return (
        "--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-ca-cert-file", str(certificate),
        "--tls-auth-clients", "no", "--tls-replication", "yes", "--tls-cluster", "yes", "--bind", "127.0.0.1",
    )  # fmt: skip


@pytest.fixture
def secure_url(start_server: Callable[..., Server], identity: tuple[str, ...]) -> str:
    """The URL of a server that speaks TLS."""
    port = str(free_port())
    start_server("--tls-port", port, *identity, name="redis7")
    return f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={identity[1]}"


def _one_job(url: str) -> None:
    with Conveyor(url) as app:
        app.queue("orders").push(1)
        [message] = app.queue("orders").pull(wait="2s")
        assert message.body == 1
        message.ack()


def test_sentinels_and_their_master_are_asked_over_tls(
    secure_url: str, identity: tuple[str, ...], tmp_path: Path
) -> None:
    """`rediss+sentinel://`: neither the sentinel nor the master is spoken to in the clear."""
    port, master = free_port(), secure_url.partition("/0")[0].rpartition(":")[2]
    monitor = f"sentinel monitor main 127.0.0.1 {master} 1\n"
    options = ("--port", "0", "--tls-port", str(port), *identity, "--sentinel")
    sentinel = Node(tmp_path, *options, configuration=monitor, name="redis7", check=False)
    try:
        url = f"rediss+sentinel://127.0.0.1:{port}/main?ssl_ca_certs={identity[1]}"
        wait_for(lambda: _one_job(url) is None, what="no job came through")
    finally:
        sentinel.kill()


def test_nodes_of_a_cluster_are_spoken_to_over_tls(
    start_server: Callable[..., Server], identity: tuple[str, ...]
) -> None:
    """`rediss+cluster://`: the map and the nodes it leads to."""
    port = free_port()
    server = start_server("--tls-port", str(port), *identity, "--cluster-enabled", "yes", name="redis7")
    with server.client() as client:
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        wait_for(
            lambda: "ok" in str(client.execute_command("CLUSTER INFO")["cluster_state"]), what="the cluster is down"
        )
    _one_job(f"rediss+cluster://127.0.0.1:{port}?ssl_ca_certs={identity[1]}")


async def test_jobs_and_messages_travel_over_tls(secure_url: str) -> None:
    """Pushes, bulk, a worker, results by push and message consumers work over `rediss://`."""
    app = Conveyor(secure_url)

    @app.task
    async def add(a: int, b: int) -> int:
        return a + b

    async with working(app):
        jobs = [await add.aenqueue(n, n) for n in range(20)]
        assert [await job.aresult(timeout=60) for job in jobs] == [2 * n for n in range(20)]

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


@pytest.mark.row("C110")
def test_a_server_that_stands_still_is_left_in_time(
    start_server: Callable[..., Server], identity: tuple[str, ...]
) -> None:
    """Over TLS too a blocking call ends in time, whether it waits for an answer or for room to write; a large body arrives whole."""
    port = str(free_port())
    server = start_server("--tls-port", port, *identity, name="redis7")
    with Conveyor(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={identity[1]}", timeout=0.5, max_payload="16MiB") as app:
        queue = app.queue("orders")
        app.ping(timeout=60)
        app.client.retry_for = 60.0
        queue.push(large := "".join(chr(97 + n % 23) for n in range(8_000_000)))
        app.client.retry_for = 0.5
        os.kill(server.pid, signal.SIGSTOP)
        thawing = threading.Timer(60, os.kill, (server.pid, signal.SIGCONT))  # else a call that waits without end
        thawing.start()
        try:
            for body in ("", "x" * 16_000_000):
                with pytest.raises(StoreUnavailable):
                    queue.push(body)
            assert thawing.is_alive()
        finally:
            thawing.cancel()
            os.kill(server.pid, signal.SIGCONT)
        app.ping(timeout=60)
        app.client.retry_for = 60.0
        assert queue.pull(1)[0].body == large


@pytest.mark.row("C41")
@pytest.mark.parametrize(
    ("certificate", "host", "hint", "wrong"),
    [
        (
            ("-subj", "/CN=other", "-addext", "subjectAltName=DNS:other"),
            "127.0.0.1",
            "a name in the URL",
            "ssl_ca_certs=",
        ),
        (
            ("-subj", "/CN=other", "-addext", "subjectAltName=DNS:other"),
            "localhost",
            "a name in the URL",
            "ssl_ca_certs=",
        ),
        (
            ("-subj", "/CN=localhost", "-not_after", "20200102000000Z"),
            "localhost",
            "Renew the server's",
            "ssl_ca_certs=",
        ),
        (("-subj", "/CN=localhost", "-not_before", "20900101000000Z"), "localhost", "clock", "ssl_ca_certs="),
    ],
    ids=["address", "name", "expired", "not yet"],
)
def test_the_hint_follows_the_reason(
    start_server: Callable[..., Server], tmp_path: Path, certificate: tuple[str, ...], host: str, hint: str, wrong: str
) -> None:
    """A certificate of a trusted authority that is refused for another reason: the advice is about that reason."""
    if find_binary("redis7") is None or shutil.which("openssl") is None:
        pytest.skip("needs a Redis 7 that speaks TLS, and openssl")
    name, port = _certificate(tmp_path, *certificate), str(free_port())
    start_server(
        "--tls-port", port, "--tls-cert-file", f"{name}.pem", "--tls-key-file", f"{name}.key", "--tls-auth-clients", "no",
        "--tls-ca-cert-file", str(tmp_path / "ca.pem"), "--bind", "127.0.0.1", name="redis7",
    )  # fmt: skip
    app = Conveyor(f"rediss://{host}:{port}?ssl_ca_certs={tmp_path / 'ca.pem'}")
    app.client.retry_for = 0.0

    with pytest.raises(StoreUnavailable, match="Cannot trust Redis") as raised:
        app.queue("orders").push(1)

    advice = str(raised.value).partition("\n")[2]
    assert hint in advice, str(raised.value)
    assert wrong not in advice
    app.close()


def _certificate(place: Path, *options: str) -> Path:
    """Make an authority, and a certificate that it signed; return its path without an ending."""
    run = partial(subprocess.run, check=True, capture_output=True)
    authority, name = place / "ca", place / "server"
    begin = next((options[i + 1] for i, one in enumerate(options) if one == "-not_before"), "20200101000000Z")
    end = next((options[i + 1] for i, one in enumerate(options) if one == "-not_after"), "21000101000000Z")
    names = [one for i, one in enumerate(options) if not {one, options[i - 1]} & {"-not_before", "-not_after"}]
    run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{authority}.key", "-out", f"{authority}.pem",
         "-days", "2", "-subj", "/CN=authority"])  # fmt: skip
    run(
        [
            "openssl",
            "req",
            "-new",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.csr",
            *names,
        ]
    )
    (place / "index.txt").write_text("")
    (place / "serial").write_text("01")
    (place / "ca.cnf").write_text(
        f"[ca]\ndefault_ca=here\n[here]\ndir={place}\ndatabase={place}/index.txt\nserial={place}/serial\nnew_certs_dir={place}\n"
        "default_md=sha256\npolicy=any\ncopy_extensions=copy\n[any]\ncommonName=supplied\n"
    )
    run(["openssl", "ca", "-batch", "-config", str(place / "ca.cnf"), "-cert", f"{authority}.pem", "-keyfile", f"{authority}.key",
         "-in", f"{name}.csr", "-out", f"{name}.pem", "-startdate", begin, "-enddate", end])  # fmt: skip
    return name


def test_a_server_of_unknown_origin_is_refused(secure_url: str) -> None:
    """A certificate of an unknown authority is an error, not a warning."""
    app = Conveyor(secure_url.partition("?")[0])
    app.client.retry_for = 0.2

    @app.task
    async def never() -> None: ...

    with pytest.raises(StoreUnavailable, match=r"(?is)certificate.*ssl_ca_certs="):
        never.enqueue()
    app.close()
