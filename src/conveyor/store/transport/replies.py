"""
The meaning of an error reply, and what to do about it.

Redis 6.2 wraps the code of an error raised inside a script (``ERR Error running script …-READONLY``), and Redis 7 keeps it
in front, so codes are searched for, not compared.
"""

from __future__ import annotations

import math
import random
import re
import time
from enum import Enum
from functools import lru_cache

import msgspec

from conveyor.errors import ConfigurationError, ConveyorError, QueueFull, StoreUnavailable
from conveyor.store.transport.credentials import NO_CREDENTIALS

_CODE = re.compile(
    r"\b(NOSCRIPT|OOM|READONLY|NOREPLICAS|MISCONF|BUSY|LOADING|TRYAGAIN|CLUSTERDOWN|MASTERDOWN|UNBLOCKED|NOPERM|NOAUTH|WRONGPASS"
    r"|WRONGTYPE|NOTBUSY)\b|^(MOVED|ASK) \d+ "
)
_FORBIDDEN = re.compile(r"ACL failure in script|user executing the script")  # 7 and 6.2, for a command in a script
_NO_DATABASE = "DB index is out of range"
_UNKNOWN = re.compile(r"unknown command .(\w+)", re.IGNORECASE)
_KEYS_MOVING = "non local key"
"""The error of a script whose slot is moving when only some of its keys have arrived."""
SLOT_MOVE_TIMEOUT = 30.0
"""Seconds for which a call waits for a slot that is moving to another node, if it waits at all."""


class ErrorAction(Enum):
    """The next step of a caller after an error reply."""

    LOAD = "send the script's text"
    WAIT = "repeat after a pause"
    RECONNECT = "connect again, then repeat"
    MOVE = "find out where the keys are now, connect there, then repeat"
    ASK = "send this one command to the node that takes the slot over"
    RAISE = "give up"


_ACTIONS = {
    "NOSCRIPT": ErrorAction.LOAD,
    "BUSY": ErrorAction.WAIT,
    "LOADING": ErrorAction.WAIT,
    "TRYAGAIN": ErrorAction.WAIT,
    "CLUSTERDOWN": ErrorAction.MOVE,
    "MASTERDOWN": ErrorAction.RECONNECT,
    "UNBLOCKED": ErrorAction.WAIT,
    "NOREPLICAS": ErrorAction.RECONNECT,
    "MISCONF": ErrorAction.WAIT,
    "READONLY": ErrorAction.RECONNECT,
    "MOVED": ErrorAction.MOVE,
    "ASK": ErrorAction.ASK,
}


def is_slot_moving(text: str) -> bool:
    """Tell whether an error reply means that the keys are moving to another node."""
    return "TRYAGAIN" in text or _KEYS_MOVING in text or text.startswith("ASK ")


def action_for(text: str) -> ErrorAction:
    """Return what to do about an error reply."""
    match = _CODE.search(text)
    if match is None:
        return ErrorAction.WAIT if _KEYS_MOVING in text else ErrorAction.RAISE
    return _ACTIONS.get(match[1] or match[2], ErrorAction.RAISE)


class CallTimeout(msgspec.Struct, frozen=True):
    """
    The longest that a call on a connection may take, everything included, in seconds.

    None: only each try has a limit, that of its endpoint. *firm*: a slot that is moving is not waited for longer either.
    """

    seconds: float | None = None
    firm: bool = True

    @property
    def longest(self) -> float | None:
        """The seconds with those for a slot that is moving."""
        return self.seconds if self.firm or self.seconds is None else max(self.seconds, SLOT_MOVE_TIMEOUT)

    def timer(self, retry_for: float | None, deadline: float | None, since: float) -> RetryTimer:
        """
        Return the timer of a call that began at *since* (monotonic) and is repeated for *retry_for* seconds.

        *deadline* (monotonic, None: by the timeout) is its end.
        """
        if deadline is not None:
            return RetryTimer(retry_for, deadline, firm=True, since=since)
        if self.seconds is None or retry_for is None:
            return RetryTimer(retry_for, since=since)
        return RetryTimer(retry_for, since + max(self.seconds, retry_for), firm=self.firm, since=since)


NO_TIMEOUT = CallTimeout()
LONGEST_PAUSE = 2.0
"""Seconds between two tries, at most."""
_LEAST = 0.001
"""Seconds that a try gets at least: 0 would mean no limit."""
_LAST_TRY = 0.02
"""Seconds before the end from which on nothing is tried again."""


def first_try(left: float, retry_for: float | None, most: float) -> float:
    """
    Return the seconds that the first try of a call may take that has *left* seconds in all.

    They are half of them all, so that a dead connection costs no call.
    """
    if left == math.inf:
        return most
    return max(min(most, left / 2 if retry_for else left), _LEAST)


@lru_cache(maxsize=256)  # nearly all calls of a program are alike in this
def usual_times(timeout: CallTimeout, retry_for: float | None, most: float) -> tuple[float, float]:
    """Return the seconds that a call without a deadline of its own may take, and those of its first try."""
    left = math.inf if timeout.seconds is None or retry_for is None else max(timeout.seconds, retry_for)
    return left, first_try(left, retry_for, most)


class RetryTimer:
    """
    The time for which one step is repeated, the pauses between, and the instant at which all of it ends.

    `seconds` of None: without limit. *deadline* is monotonic. `longest_pause` may be lowered, in seconds.
    """

    __slots__ = ("_attempt", "_firm", "_since", "deadline", "longest_pause", "seconds")

    def __init__(
        self, seconds: float | None, deadline: float = math.inf, *, firm: bool = False, since: float | None = None
    ) -> None:
        self.seconds, self._since, self._attempt = seconds, time.monotonic() if since is None else since, 0
        self.deadline, self._firm, self.longest_pause = deadline, firm, LONGEST_PAUSE

    def next_try(self, most: float) -> float:
        """Return the seconds that another try may take."""
        return max(min(most, self.deadline - time.monotonic()), _LEAST)

    def next_pause(self, text: str) -> float | None:
        """Return the seconds before the next try, None when the time is over; *text* is the error of this try."""
        wait, seconds = backoff(self._attempt, cap=self.longest_pause), self.seconds
        self._attempt += 1
        if seconds is None:
            return wait
        if seconds >= 1 and is_slot_moving(text) and not self._firm:
            # A large slot moves for longer than an outage is waited for, and what follows (MOVED, a new connection) is part of it.
            self.seconds = seconds = max(seconds, SLOT_MOVE_TIMEOUT)
            self.deadline = max(self.deadline, self._since + seconds)
        # Shorter towards the end: a pause that was drawn long is no reason to give up before the time is over.
        left = min(self._since + seconds, self.deadline) - time.monotonic()
        return min(wait, left / 2) if left > _LAST_TRY else None


_QUESTION = " Are you sure your configuration is correct?"
"""Redis asks it behind an error; what to do follows there anyway."""


def fatal_error(text: str, address: str) -> ConveyorError:
    """Return the exception for an error reply that a retry does not solve."""
    match = _CODE.search(text)
    code = match[1] if match else "NOPERM" if _FORBIDDEN.search(text) else ""
    if code == "OOM":
        return QueueFull(
            f"Redis at {address} has reached its maxmemory and refuses new data. Nothing was enqueued. "
            "Workers continue to drain the queues. Give Redis more memory, or try again later."
        )
    if code in {"NOAUTH", "WRONGPASS"}:
        advice = "Correct the user and password: in the URL (redis://user:password@host:6379/0), or where credentials= takes them."
        if "without any password configured" in text:
            advice = "The server has no password: remove it from the URL."
        return ConfigurationError(
            f"Redis at {address} refuses the login: {text.removesuffix(_QUESTION).rstrip('.')}. {advice}", code="E17"
        )
    if code == "NOPERM":
        # Redis 6.2 and 7.0 name the script and not the command.
        why = "a script needs a command or a key that is not allowed" if _FORBIDDEN.search(text) else text.rstrip(".")
        return ConfigurationError(
            f"Redis at {address} refuses this user: {why}. `conveyor acl` prints what each role needs.", code="E17"
        )
    if code == "WRONGTYPE":
        return ConfigurationError(
            f"A key of Conveyor at {address} holds data of another program: {text}. Use another namespace."
        )
    if _NO_DATABASE in text:
        return ConfigurationError(
            f"Redis at {address} has no database of that number: {text}. There are 16, numbered from 0, unless its "
            "configuration sets another number. To keep programs apart, namespace= is enough."
        )
    unknown = _UNKNOWN.search(text)
    if unknown is not None:
        return ConfigurationError(
            f"The server at {address} does not know the command {unknown[1]}. If it is a sentinel, write "
            "redis+sentinel://host:26379,host:26379/mymaster. If not, the command was renamed in its configuration.",
            code="E33",
        )
    return ConveyorError(f"Redis at {address} answered: {text}")


def not_sendable(error: UnicodeEncodeError | TypeError) -> ConfigurationError:
    """Return the error for a command that has a word which is no text that can be stored; none of it was sent."""
    if isinstance(error, UnicodeEncodeError):
        text = error.object
        return ConfigurationError(
            f"{text[max(0, error.start - 20) : error.end + 20]!a} has half of a surrogate pair, which is no text. Nothing was sent."
        )
    return ConfigurationError("A name or an id is of a type that cannot be sent: it must be a text. Nothing was sent.")


def unavailable(address: str, cause: object) -> StoreUnavailable:
    """Return the exception for a server that does not answer."""
    reason = str(cause).strip().rstrip(".") or type(cause).__name__
    if is_slot_moving(reason):
        return StoreUnavailable(
            f"The slot of these keys is moving to another node of {address} and has not arrived yet: {reason}. Try again, or "
            "find out what delays it: redis-cli --cluster check."
        )
    if reason.startswith("READONLY"):
        return StoreUnavailable(
            f"Redis at {address} is a replica and accepts no writes: {reason}. Use its primary, which `conveyor doctor` names."
        )
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return StoreUnavailable(f"Cannot trust Redis at {address}: {reason}.\n{_certificate_hint(reason)}")
    if _CODE.match(reason) or reason.startswith(("ERR ", "Error running")):  # it was reached, and gave the reason
        return StoreUnavailable(f"Redis at {address} cannot do this now: {reason}.{_hint(address, reason)}")
    if reason.startswith(NO_CREDENTIALS):
        return StoreUnavailable(f"Cannot log in to Redis at {address}: {reason}.")
    if "+" in address.partition("://")[0]:  # a user who names several hosts knows CONVEYOR_URL
        return StoreUnavailable(f"Cannot reach Redis at {address}: {reason}.{_hint(address, reason)}")
    return StoreUnavailable(
        f"Cannot reach Redis at {address}: {reason}.{_hint(address, reason)}\n"
        "For development leave CONVEYOR_URL unset: an embedded server starts by itself.\n"
        "In production: export CONVEYOR_URL=redis://host:6379/0"
    )


def _certificate_hint(reason: str) -> str:
    """Return what to do about a certificate that was refused; OpenSSL's reason stands in *reason*."""
    if "is not valid for" in reason:  # the authority is trusted already: names are compared afterwards
        return "Write a name in the URL that its certificate holds, or give it a certificate for this name."
    if "has expired" in reason:
        return "Renew the server's certificate, or that of its authority; if neither is over, correct this machine's clock."
    if "not yet valid" in reason:
        return "Its time has not begun: correct this machine's clock, or wait."
    if "revoked" in reason:
        return "Give the server a new certificate: its authority has withdrawn this one."
    return "Name the authority that signed its certificate:  rediss://…?ssl_ca_certs=/path/ca.crt"


def _hint(address: str, reason: str) -> str:
    """Return a hint for errors whose text does not name the cause, such as TLS spoken to a plain port."""
    if "NOREPLICAS" in reason:
        return " Bring its replicas back, or lower min-replicas-to-write."
    if address.startswith("rediss") and "No such file" in reason:
        return " A file that the URL names (ssl_ca_certs, ssl_certfile, ssl_keyfile) does not exist."
    if address.startswith("rediss") and re.search("(?i)timeout connecting|WRONG_VERSION|record layer", reason):
        return " If the server does not use TLS, write redis instead of rediss."
    if address.startswith("redis:") and re.search("(?i)closed by server|reset by peer", reason):
        return " If the server accepts only TLS, write rediss instead of redis."
    return ""


def backoff(attempt: int, *, cap: float = LONGEST_PAUSE) -> float:
    """Return the seconds before repeat number *attempt* (from 0): full jitter, so that many clients spread out."""
    # The exponent is bounded too: after a quarter of an hour the power itself would be too large for a float.
    return random.uniform(0.005, min(cap, 0.02 * 2 ** min(attempt, 20)))  # noqa: S311  no secret


def parse_info(reply: object) -> dict[str, str]:
    """Return the fields of a reply to INFO; none for anything else, such as None or an error."""
    text = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else ""
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
