"""
Durability of a push beyond being stored: on disk, or on replicas. Nothing here talks to Redis.

WAIT and WAITAOF cover what their own connection wrote, so they travel right behind the push, in the same write.
`confirmed.py` carries it out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from typing import Any, TypedDict, TypeVar

import msgspec

from conveyor import ids as ident
from conveyor.errors import ConfigurationError, DurabilityNotReached
from conveyor.store.transport.replies import fatal_error, parse_info
from conveyor.units import Duration, milliseconds

N = TypeVar("N", bound=int)
MAX_REPLICAS = 1000
TIMEOUT_MS = 5_000
"""Milliseconds a confirmation is waited for by default."""
SYNC_INTERVAL = 1.2
"""Seconds within which ``appendfsync everysec`` begins an fsync: a second, and a tick of the server's clock."""
CHECK_INTERVAL = 0.05
RELIABLE_WAITAOF_SINCE = (8, 0)
"""The first Redis whose WAITAOF waits under everysec; of Valkey no release up to 9.1 does."""


class Durability(msgspec.Struct, frozen=True):
    """The durability of a push: an fsync of the append-only file, a number of replicas; falsy when neither."""

    fsync: bool = False
    replicas: int = 0
    timeout_ms: int = TIMEOUT_MS

    def __bool__(self) -> bool:
        return self.fsync or self.replicas > 0

    @property
    def seconds(self) -> float:
        """The longest time in which the server may delay the replies: the two waits follow each other."""
        return (self.fsync + (self.replicas > 0)) * self.timeout_ms / 1000

    def probe_commands(self) -> tuple[tuple[str, ...], ...]:
        """Return the commands that probe a new connection before its first push, for `decide_fsync_method`."""
        wait = ("WAIT", "0", "1")  # answers at once: is it permitted, and is this a primary?
        if not self.fsync:
            return (wait,)
        return (
            wait, ("WAITAOF", "1", "0", "1"), ("INFO", "server"), ("INFO", "persistence"),
            ("CONFIG", "GET", "appendfsync"), ("CONFIG", "GET", "no-appendfsync-on-rewrite"),
        )  # fmt: skip

    def wait_commands(self, method: FsyncMethod) -> list[tuple[str, ...]]:
        """Return the commands that follow a push."""
        timeout = str(self.timeout_ms)
        commands: list[tuple[str, ...]] = []
        if self.fsync and method is not FsyncMethod.REPLY:
            commands.append(("WAITAOF", "1", "0", timeout))
        if self.replicas:
            commands.append(("WAIT", str(self.replicas), timeout))
        return commands

    def read_replies(self, method: FsyncMethod, replies: Sequence[Any]) -> Confirmation:
        """Return what was confirmed. Raises WaitInterrupted when the server changed its role meanwhile."""
        rest = list(replies)
        synced = method is FsyncMethod.REPLY
        if self.fsync and method is not FsyncMethod.REPLY:
            reply = rest.pop(0)
            synced = isinstance(reply, list) and int(reply[0]) > 0
            _check_role(reply)
        replicas = 0
        if self.replicas:
            _check_role(rest[0])
            replicas = rest[0] if isinstance(rest[0], int) else 0
        return Confirmation(synced, replicas)

    def is_reached_by(self, confirmation: Confirmation) -> bool:
        """Tell whether *confirmation* is what was requested."""
        return confirmation.replicas >= self.replicas and (confirmation.synced or not self.fsync)

    def failure(self, queue: str, ids: Sequence[str], confirmation: Confirmation) -> DurabilityNotReached:
        """Return the error for jobs that are stored and not confirmed; *ids* are bare."""
        return self.failure_of([ident.public(queue, id_) for id_ in ids], confirmation)

    def failure_of(self, public: Sequence[str], confirmation: Confirmation) -> DurabilityNotReached:
        """Return the error for jobs that are stored and not confirmed, by their public ids."""
        missing = []
        if self.fsync and not confirmation.synced:
            missing.append("no sync of the append-only file")
        if confirmation.replicas < self.replicas:
            missing.append(f"{confirmation.replicas} of {self.replicas} replica{'s' * (self.replicas > 1)}")
        what = f"Job {public[0]} is queued" if len(public) == 1 else f"{len(public):,} jobs are queued"
        return DurabilityNotReached(
            f"{what}, but not confirmed as widely as asked: {' and '.join(missing)} within {self.timeout_ms / 1000:g} s. "
            "It runs unless the server is lost before that; pushing it again with the same id stores nothing twice "
            "and waits again. See `conveyor doctor`.",
            job_ids=list(public), asked=self.replicas, got=confirmation.replicas, fsync=confirmation.synced if self.fsync else None,
        )  # fmt: skip


def after_partial_push(error: DurabilityNotReached, before: Sequence[str]) -> DurabilityNotReached:
    """
    Return the error of a bulk push that stopped there.

    *before* are the public ids of the jobs that it had stored and confirmed.
    """
    first = f"The first {len(before):,} were stored and confirmed before; what" if before else "What"
    return DurabilityNotReached(
        f"{error}\n{first} follows in the same call was not stored.",
        job_ids=[*before, *error.job_ids], asked=error.asked, got=error.got, fsync=error.fsync,
    )  # fmt: skip


class Confirmation(msgspec.Struct, frozen=True):
    """The durability that a server confirmed for one push."""

    synced: bool
    replicas: int


class FsyncMethod(Enum):
    """The way in which a connection learns that its push is on disk."""

    REPLY = "the reply itself says so: appendfsync always"
    WAITAOF = "WAITAOF says so"
    WATCH = "WAITAOF is not to be trusted under everysec: watch a whole sync go by"
    NONE = "it cannot, or was not asked to"


class WaitInterrupted(ConnectionError):
    """The server ended the wait because it is no longer a primary."""


def _check_role(reply: Any) -> None:
    text = str(reply) if isinstance(reply, Exception) else ""
    if "UNBLOCKED" in text or "replica instance" in text or "READONLY" in text:
        raise WaitInterrupted(text)


def decide_fsync_method(durability: Durability, replies: Sequence[Any], where: str) -> FsyncMethod:
    """
    Return how an fsync is confirmed, by the replies to `probe_commands`.

    Raises ConfigurationError where the request can never be met (E36): nothing was stored.
    """
    _check_role(replies[0])
    if isinstance(replies[0], Exception):
        raise fatal_error(str(replies[0]), where) from replies[0]
    if not durability.fsync:
        return FsyncMethod.NONE
    _, waitaof, *settings = replies
    server, persistence = parse_info(settings[0]), parse_info(settings[1])
    policy, lazy = _setting(settings[2]), _setting(settings[3])
    always = policy == "always" and lazy == "no"
    text = str(waitaof) if isinstance(waitaof, Exception) else ""
    if persistence.get("aof_enabled") == "0" or "appendonly" in text:
        raise _not_confirmable(where, "its append-only file is off", "CONFIG SET appendonly yes")
    if policy == "no":
        raise _not_confirmable(
            where, "appendfsync is 'no', so it never syncs by itself", "CONFIG SET appendfsync everysec"
        )
    if "unknown command" in text.lower():
        if always and persistence.get("aof_enabled") == "1":
            return FsyncMethod.REPLY
        if policy is None or not persistence:
            raise _not_confirmable(
                where, "it has no WAITAOF and does not tell this user its settings", "ACL SETUSER … +info +config|get"
            )
        what = "no-appendfsync-on-rewrite is on" if policy == "always" else f"appendfsync is {policy!r}"
        raise _not_confirmable(
            where, f"it is older than 7.2, which has WAITAOF, and {what}",
            "CONFIG SET appendfsync always" if policy != "always" else "CONFIG SET no-appendfsync-on-rewrite no",
        )  # fmt: skip
    if text:
        raise fatal_error(text, where) from waitaof
    if always or _waitaof_is_reliable(server):
        return FsyncMethod.WAITAOF
    if not persistence:
        raise _not_confirmable(where, "it does not tell this user when it syncs", "ACL SETUSER … +info")
    return FsyncMethod.WATCH


def _not_confirmable(where: str, why: str, remedy: str) -> ConfigurationError:
    return ConfigurationError(
        f"fsync=True cannot be confirmed by Redis at {where}: {why}. Nothing was stored. Set it: {remedy}, and the same "
        "in its configuration file; or leave fsync out.",
        code="E36",
    )


def _waitaof_is_reliable(server: dict[str, str]) -> bool:
    """Tell whether WAITAOF waits for the fsync under everysec: not before Redis 8.0, and not in Valkey."""
    if "valkey_version" in server or not (version := re.match(r"(\d+)\.(\d+)", server.get("redis_version", ""))):
        return False
    return (int(version[1]), int(version[2])) >= RELIABLE_WAITAOF_SINCE


def _setting(reply: Any) -> str | None:
    return reply[1].decode() if isinstance(reply, list) and len(reply) > 1 else None


class FsyncWatch:
    """
    Watches for a complete fsync, where WAITAOF answers before it (Valkey up to 9.1 and Redis before 8.0, under everysec).

    Once all is written and no fsync is in progress, the next one covers it. Under everysec one begins within a second, and
    when none is in progress after that, it has ended. Measured on Valkey 9.1: WAITAOF confirmed 5,557 writes during 4 fsyncs.
    *now* is monotonic time after the reply to the push.
    """

    COMMAND = ("INFO", "persistence")

    def __init__(self, now: float, timeout_ms: int) -> None:
        self._deadline = now + timeout_ms / 1000
        self._since: float | None = None

    def next_pause(self, reply: Any, now: float) -> float | None:
        """Return the seconds before the next INFO; None at the end: `synced` tells the result."""
        facts = parse_info(reply)
        resting = (
            facts.get("aof_pending_bio_fsync") == "0"
            and facts.get("aof_buffer_length") == "0"
            and facts.get("aof_last_write_status") == "ok"
        )
        if resting and self._since is not None and now - self._since >= SYNC_INTERVAL:
            self.synced = True
            return None
        if resting and self._since is None:
            self._since = now
        if now >= self._deadline:
            return None
        synced_at = now if self._since is None else self._since + SYNC_INTERVAL
        goal = synced_at if now < synced_at else now + CHECK_INTERVAL
        return max(0.001, min(goal, self._deadline) - now)

    synced = False


class DurabilityRequest(msgspec.Struct, frozen=True):
    """The durability that one call asks for; None: as its queue does."""

    fsync: bool | None = None
    replicas: int | None = None
    timeout_ms: int | None = None

    def applied_to(self, declared: Durability | None) -> Durability | None:
        """Return the durability of a push to a queue with *declared*; None for nothing."""
        default = declared if declared is not None else Durability()
        durability = Durability(
            default.fsync if self.fsync is None else self.fsync,
            default.replicas if self.replicas is None else self.replicas,
            default.timeout_ms if self.timeout_ms is None else self.timeout_ms,
        )
        return durability or None

    def combined_with(self, other: DurabilityRequest | None) -> DurabilityRequest:
        """Return a request that satisfies both, for calls that travel together."""
        if other is None or other == self:
            return self
        return DurabilityRequest(
            _larger(self.fsync, other.fsync),
            _larger(self.replicas, other.replicas),
            _larger(self.timeout_ms, other.timeout_ms),
        )


def durability_request(
    fsync: object = None, replicas: object = None, timeout: Duration | None = None
) -> DurabilityRequest | None:
    """Return what a call asks for, checked; None where it leaves all to its queue. Raises ConfigurationError."""
    if fsync is None and replicas is None and timeout is None:
        return None
    if fsync is not None and not isinstance(fsync, bool):
        raise ConfigurationError(f"fsync must be True or False, not {fsync!r}. Nothing was stored.")
    if replicas is not None and (
        not isinstance(replicas, int) or isinstance(replicas, bool) or not 0 <= replicas <= MAX_REPLICAS
    ):
        raise ConfigurationError(
            f"wait_replicas must be a whole number from 0 to {MAX_REPLICAS}, not {replicas!r}. Nothing was stored."
        )
    timeout_ms = None if timeout is None else milliseconds(timeout, name="wait_timeout")
    if timeout_ms == 0:
        raise ConfigurationError(
            "wait_timeout must be greater than zero: Redis takes 0 as waiting without a limit. Nothing was stored."
        )
    return DurabilityRequest(fsync, replicas, timeout_ms)


class DurabilityOptions(TypedDict, total=False):
    """The durability that a queue asks for with every push."""

    fsync: bool
    wait_replicas: int
    wait_timeout: Duration


def requested_durability(options: DurabilityOptions) -> Durability | None:
    """
    Return what a queue asks for with every push; None for nothing.

    Raises ConfigurationError, and TypeError for an unknown option.
    """
    if wrong := options.keys() - DurabilityOptions.__annotations__.keys():
        raise TypeError(f"queue() got an unexpected keyword argument {min(wrong)!r}")
    request = durability_request(options.get("fsync"), options.get("wait_replicas"), options.get("wait_timeout"))
    return None if request is None else request.applied_to(None)


def _larger(one: N | None, other: N | None) -> N | None:
    return max((each for each in (one, other) if each is not None), default=None)
