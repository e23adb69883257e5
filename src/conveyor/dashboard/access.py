"""Access to the dashboard: what a visitor may do, how a visitor is recognised, and which requests may change anything."""

from __future__ import annotations

import base64
import binascii
import hmac
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from starlette.requests import Request

from conveyor.errors import ConfigurationError

Action = Literal[
    "retry_jobs", "cancel_jobs", "delete_jobs", "edit_jobs", "enqueue_jobs", "pull_messages", "pause_queues", "purge_queues",
    "manage_schedules", "manage_limits", "stop_workers", "view_payloads",
]  # fmt: skip
ACTIONS: tuple[Action, ...] = get_args(Action)
_MOST_FAILURES = 20
"""Wrong passwords of one address in a minute, behind which it is not asked any more."""
_MOST_ADDRESSES = 10_000


@dataclass(frozen=True, slots=True)
class Access:
    """
    The rights of one visitor: whether anything is shown (`looks`), and which `actions` are allowed.

    `view_payloads` among the actions shows arguments, results, logs, and the messages and tracebacks of errors. `user` is the
    name in the audit.
    """

    ALL: ClassVar[Access]
    """Everything."""
    READ_ONLY: ClassVar[Access]
    """Everything is shown, payloads too, and nothing can be changed."""
    DENY: ClassVar[Access]
    """Nothing is shown."""

    looks: bool = False
    actions: frozenset[Action] = frozenset()
    user: str | None = None

    @classmethod
    def only(cls, *actions: Action) -> Access:
        """Return the right to look and to do these actions. Raises ConfigurationError for an unknown one."""
        if unknown := sorted(set(actions) - set(ACTIONS)):
            raise ConfigurationError(f"There is no action {unknown[0]!r}. Known: {', '.join(ACTIONS)}.")
        return cls(looks=True, actions=frozenset(actions))

    def named(self, user: str) -> Access:
        """Return the same rights with the name of the user for the audit."""
        return replace(self, user=user)

    def without_changes(self) -> Access:
        """Return the part of the rights that changes nothing."""
        return replace(self, actions=self.actions & {"view_payloads"})

    def allows(self, action: Action | None) -> bool:
        """Tell whether an action is allowed; None: to look."""
        return self.looks and (action is None or action in self.actions)


Access.ALL = Access(looks=True, actions=frozenset(ACTIONS))
Access.READ_ONLY = Access(looks=True, actions=frozenset({"view_payloads"}))
Access.DENY = Access()

ROLES: dict[str, Access] = {
    "all": Access.ALL, "read-only": Access.READ_ONLY, "producer": Access.only("enqueue_jobs"),
    "consumer": Access.only("pull_messages"),
}  # fmt: skip
Authorize = Callable[[Request], Access | Awaitable[Access]]


def check_access(authorize: object, tokens: object, hosts: object) -> None:
    """Raise ConfigurationError for what cannot say who may do what, or by which names a dashboard is asked."""
    if authorize is not None and not callable(authorize):
        raise ConfigurationError(
            "dashboard(authorize=…) takes a function of the request that returns an Access, such as "
            f"lambda request: Access.READ_ONLY, not {authorize!r:.100}."
        )
    if not isinstance(tokens, Mapping) or not all(
        isinstance(token, str) and token and isinstance(access, Access) for token, access in tokens.items()
    ):
        raise ConfigurationError("dashboard(tokens=…) takes tokens and their Access: {'SECRET': Access.READ_ONLY}.")
    if isinstance(hosts, str):
        raise ConfigurationError(f"dashboard(hosts=…) takes a list of names: hosts=[{hosts!r}].")


class LoginRequired(Exception):
    """The visitor is not known; *scheme* is how a browser is to ask."""

    def __init__(self, scheme: str) -> None:
        super().__init__(scheme)
        self.scheme = scheme


class TooManyAttempts(Exception):
    """An address has given too many wrong passwords."""


class BasicAuth:
    """
    Recognises visitors by name and password (HTTP Basic), for `dashboard(authorize=)`.

    *users*: name → password, or (password, Access). More than twenty wrong passwords in a minute from one address are answered
    with 429.
    """

    def __init__(self, users: Mapping[str, str | tuple[str, Access]]) -> None:
        if not isinstance(users, Mapping) or not users:
            raise ConfigurationError("BasicAuth needs a user at least: {'ada': 'password'}.")
        self._users = {name: (entry, Access.ALL) if isinstance(entry, str) else entry for name, entry in users.items()}
        if any(not password for password, _ in self._users.values()):
            raise ConfigurationError("A password of the dashboard must not be empty.")
        self._failures: dict[str, tuple[float, int]] = {}

    def __call__(self, request: Request) -> Access:
        """Return the rights of the visitor; raises LoginRequired and TooManyAttempts."""
        given = _basic_credentials(request.headers.get("authorization", ""))
        if given is None:
            raise LoginRequired("Basic")
        address = request.client.host if request.client else ""
        since, failed = self._failures.get(address, (0.0, 0))
        if time.monotonic() - since > 60:
            since, failed = time.monotonic(), 0
        if failed >= _MOST_FAILURES:
            raise TooManyAttempts
        name, password = given
        known, access = self._users.get(name, ("", Access.DENY))
        if known and hmac.compare_digest(known.encode(), password.encode()):
            return access.named(name)
        if len(self._failures) >= _MOST_ADDRESSES:
            self._failures.clear()
        self._failures[address] = (since, failed + 1)
        raise LoginRequired("Basic")


def parse_auth(text: str) -> dict[str, tuple[str, Access]]:
    """
    Return the users in *text*: ``ada:password``, with a role behind it (such as ``:read-only``); several by commas.

    Raises ConfigurationError.
    """
    users: dict[str, tuple[str, Access]] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, colon, password = entry.partition(":")
        access = Access.ALL
        for role, rights in ROLES.items():
            if password.endswith(f":{role}"):
                password, access = password.removesuffix(f":{role}"), rights
        if not (name and colon and password):
            raise ConfigurationError(
                f"--auth takes NAME:PASSWORD, or NAME:PASSWORD:ROLE ({', '.join(ROLES)}); several with commas between them."
            )
        users[name] = (password, access)
    if not users:
        raise ConfigurationError("--auth names no user: give NAME:PASSWORD.")
    return users


def bearer_access(request: Request, tokens: Mapping[str, Access]) -> Access | None:
    """Return the rights of the token in the request; None without one. Raises LoginRequired for an unknown token."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        return None
    found = None
    for token, access in tokens.items():  # all of them: the time tells nothing
        if hmac.compare_digest(token.encode(), given.strip().encode()):
            found = access
    if found is None:
        raise LoginRequired("Bearer")
    return found if found.user else found.named("token")


def is_own_page(request: Request) -> bool:
    """
    Tell whether a request that changes something comes from a page of this dashboard.

    Browsers say so by `Sec-Fetch-Site` where the connection is trusted, else by `Origin`, which must be that of the host.
    """
    if (site := request.headers.get("sec-fetch-site")) is not None:
        return site == "same-origin"
    origin = request.headers.get("origin")
    return origin is not None and origin.partition("://")[2].lower() == request.headers.get("host", "").lower()


def is_allowed_host(request: Request, hosts: Sequence[str] | None) -> bool:
    """Tell whether the name by which the dashboard was asked is one of *hosts* (None: any)."""
    if hosts is None:
        return True
    host = request.headers.get("host", "").lower()
    bare = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
    return bare in hosts or host in hosts


def _basic_credentials(header: str) -> tuple[str, str] | None:
    scheme, _, text = header.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        name, colon, password = base64.b64decode(text.strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return (name, password) if colon else None
