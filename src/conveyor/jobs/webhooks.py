"""Webhooks: the end of a job is told to a URL by a job of an internal task, signed as Standard Webhooks are."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from conveyor.errors import ConfigurationError, RetryIn
from conveyor.messaging.retry import Retry
from conveyor.units import instant

EndState = Literal["done", "dead"]
TASK = "conveyor.webhook"
_TIMEOUT, _TOTAL = 10.0, 30.0
"""Seconds that one step of a request may take, and all of it."""
_MOST_READ = 65_536
"""Bytes of an answer that are read at most."""
_RETRY_AFTER = 3600
"""Seconds that a receiver may put a delivery off by Retry-After, at most."""


class WebhookFailed(Exception):
    """A receiver did not take a webhook; it is tried again."""


class WebhookRefused(Exception):
    """A webhook cannot be delivered, and no repetition would change it."""


@dataclass(frozen=True)
class Webhook:
    """
    The receiver that is told how the jobs of a task end, for ``@app.task(webhook=Webhook(url, secret=…))``.

    *secret*: ``"whsec_"`` and at least 24 bytes in base64, as Standard Webhooks have it. *on*: the ends that are told.
    *allow_private*: the address may be private or of this machine, and the URL may begin with http. Raises ConfigurationError.
    """

    url: str
    secret: str = field(repr=False)
    on: Sequence[EndState] = ("done", "dead")
    allow_private: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        parts = urlsplit(self.url) if isinstance(self.url, str) else None
        if parts is None or parts.scheme not in {"http", "https"} or not parts.hostname or parts.username is not None:
            raise ConfigurationError(
                f"Webhook(url=…) takes a URL such as 'https://example.org/hook', not {self.url!r}."
            )
        if parts.scheme == "http" and not self.allow_private:
            raise ConfigurationError(
                f"A webhook goes to https, not {self.url!r}: its body would be readable on the way. Within a private network: "
                "Webhook(…, allow_private=True)."
            )
        if not self.allow_private and (refusal := _refusal(parts.hostname)) is not None:
            raise ConfigurationError(refusal)
        ends = self.on if isinstance(self.on, Iterable) and not isinstance(self.on, str) else ()
        if not (known := [end in ("done", "dead") for end in ends]) or not all(known):
            raise ConfigurationError(f"Webhook(on=…) takes 'done', 'dead' or both in a list, not {self.on!r}.")
        self.key  # noqa: B018  checks it

    @property
    def key(self) -> bytes:
        """The bytes of the secret."""
        text = self.secret.removeprefix("whsec_") if isinstance(self.secret, str) else ""
        try:
            key = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if not text or text == self.secret or len(key) < 24:
            raise ConfigurationError(
                "Webhook(secret=…) takes 'whsec_' and at least 24 bytes in base64. Make one:  "
                "python -c \"import base64, secrets; print('whsec_' + base64.b64encode(secrets.token_bytes(32)).decode())\""
            )
        return key


DELIVERY = Retry(attempts=10, backoff="5s", cap="3h", give_up=(WebhookRefused,))
"""When a delivery that failed is tried again: over some hours."""


class WebhookPostponed(RetryIn):
    """The receiver said when to come again."""

    def __init__(self, delay: float, text: str) -> None:
        super().__init__(delay)
        self.args = (text,)


def sign(key: bytes, id: str, timestamp: int, body: bytes) -> str:  # noqa: A002
    """Return the signature of a webhook, as the header `webhook-signature` has it."""
    digest = hmac.digest(key, b"%b.%d.%b" % (id.encode(), timestamp, body), hashlib.sha256)
    return "v1," + base64.b64encode(digest).decode()


def send(webhook: Webhook, id: str, told: dict[str, Any]) -> int:  # noqa: A002
    """Deliver one webhook; return the status. Raises WebhookFailed, WebhookRefused, RetryIn."""
    from http.client import HTTPException  # most programs deliver none, and need not import it

    state = told["state"]
    body = msgspec.json.encode({"type": f"job.{state}", "timestamp": told["at"], "data": told})
    now = int(time.time())
    headers = {
        "content-type": "application/json", "user-agent": "conveyor-webhooks", "webhook-id": id, "webhook-timestamp": str(now),
        "webhook-signature": sign(webhook.key, id, now, body), "connection": "close",
    }  # fmt: skip
    try:
        status, retry_after = _post(webhook, body, headers)
    except (OSError, HTTPException) as error:
        raise WebhookFailed(f"{_place(webhook)} did not take it: {type(error).__name__}: {error}") from None
    if 200 <= status < 300:
        return status
    if status == 410:
        raise WebhookRefused(f"{_place(webhook)} answered 410: it wants no webhooks any more.")
    if status in {429, 503} and retry_after.isdecimal():
        raise WebhookPostponed(min(int(retry_after), _RETRY_AFTER), f"{_place(webhook)} answered {status}.")
    redirect = " (redirects are not followed)" if 300 <= status < 400 else ""
    raise WebhookFailed(f"{_place(webhook)} answered {status}{redirect}.")


def _post(webhook: Webhook, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
    import http.client
    import ssl

    parts = urlsplit(webhook.url)
    host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
    ends_at = time.monotonic() + _TOTAL
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT)
    connection.sock = _connect(webhook, host, port, ends_at)
    try:
        with _ended_at(connection.sock, ends_at):
            if parts.scheme == "https":
                connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            default = port == (443 if parts.scheme == "https" else 80)
            name = f"[{host}]" if ":" in host else host
            connection.request("POST", path, body, {"host": name if default else f"{name}:{port}", **headers})
            answer = connection.getresponse()
            read = 0
            while read < _MOST_READ and (part := answer.read1(4096)):
                read += len(part)
        return answer.status, answer.getheader("retry-after", "")
    finally:
        connection.close()


@contextmanager
def _ended_at(connection: socket.socket, instant: float) -> Iterator[None]:
    """
    End *connection* at *instant* (monotonic); what uses it then gets a TimeoutError.

    A receiver that sends a byte now and then keeps each step within its timeout, and would hold a thread without end.
    """
    twin, is_over = connection.dup(), threading.Event()  # TLS takes the socket itself over

    def end() -> None:
        is_over.set()
        with suppress(OSError):
            twin.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, instant - time.monotonic()), end)
    timer.daemon, timer.name = True, "conveyor-webhook"
    timer.start()
    try:
        yield
    except Exception:
        if not is_over.is_set():
            raise
    finally:
        timer.cancel()
        twin.close()
    if is_over.is_set():
        raise TimeoutError(f"it took longer than {_TOTAL:g} s")


def _connect(webhook: Webhook, host: str, port: int, ends_at: float) -> socket.socket:
    """Connect to an address that was checked: the name is not looked up again."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [entry[4] for entry in found]
    if not webhook.allow_private:
        for address in addresses:
            if (refusal := _refusal(str(address[0]))) is not None:
                raise WebhookRefused(refusal)
    last: OSError | None = None
    for address in addresses[:4]:
        try:
            timeout = max(0.001, min(_TIMEOUT, ends_at - time.monotonic()))
            connection = socket.create_connection(address[:2], timeout=timeout)  # type: ignore[arg-type]
            connection.settimeout(_TIMEOUT)
            return connection
        except OSError as error:
            last = error
    raise last or OSError(f"{host} has no address")


def _refusal(address: str) -> str | None:
    """Return why a webhook may not go to an address; None for one of the public network, and for a name."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        if address.lower().rstrip(".") != "localhost" and not address.lower().endswith(".localhost"):
            return None
        ip = ipaddress.ip_address("127.0.0.1")
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    if (mapped or ip).is_global and not ip.is_multicast:
        return None
    return (
        f"The address {address} of a webhook is private, or of this machine. Whoever chooses the URL could reach what only this "
        "machine can. If it is meant: Webhook(…, allow_private=True)."
    )


def _place(webhook: Webhook) -> str:
    """Return the receiver without the path and the query, which may hold secrets."""
    parts = urlsplit(webhook.url)
    return f"{parts.scheme}://{parts.hostname}"


def told_of(job_id: str, task: str, queue: str, attempt: int, now_ms: int) -> dict[str, Any]:
    """Return what a webhook tells of the end of a job."""
    at = instant(now_ms).isoformat(timespec="milliseconds")
    return {"id": job_id, "task": task, "queue": queue, "attempt": attempt, "at": at}
