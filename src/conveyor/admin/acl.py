"""
Least privilege: what each kind of program must be allowed to do in Redis, as rules of its ACL.

A role names its scripts and the commands sent beside them. What a script calls is read from its text, since
Redis checks commands, keys and channels inside a script against the user who runs it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from conveyor.errors import ConfigurationError
from conveyor.jobs import spawn_outbox
from conveyor.store import inspection, operations, partitions, plain_list
from conveyor.store.keys import check_namespace
from conveyor.store.script import Script

PASSWORD = "#SHA256-OF-THE-PASSWORD"  # noqa: S105  Redis refuses it as it stands, so nobody runs with a known password
SERVERS = ("6.2", "7.0", "7.2")
TOPOLOGIES = ("standalone", "sentinel", "cluster")

_USER = re.compile(r"[A-Za-z0-9_.:@-]{1,64}")
_UNSAFE = re.compile(r"[^A-Za-z0-9_.:@/{}=+-]")  # has a meaning in a pattern, or in a line of redis-cli
_FUNCTION = re.compile(r"^local function (\w+)(?:[^\n]*\bend$|.*?^end$)", re.MULTILINE | re.DOTALL)
_CALL = re.compile(r"redis\.p?call\(([^,()]*)")
_PASSED = re.compile(r"(?<!redis\.)(?<!redis\.p)\b(?!redis)\w+\(([^()]*)")  # check('HLEN', key) calls what it is given
_LITERAL = re.compile(r"'([A-Z]{2,})'")


@dataclass(frozen=True)
class Role:
    """A kind of program: its scripts, the commands it sends besides, and whether it hears or tells of results."""

    name: str
    does: str
    scripts: tuple[Script, ...] = ()
    commands: tuple[str, ...] = ()
    channels: bool = False

    def and_(self, other: Role) -> Role:
        """Return this role with all that *other* may do besides."""
        return Role(
            self.name, self.does, (*self.scripts, *other.scripts), (*self.commands, *other.commands),
            self.channels or other.channels,
        )  # fmt: skip


_RUN = ("evalsha", "eval")
_PRODUCER = Role(
    "producer",
    "pushes and enqueues, asks for status and results, cancels; takes nothing",
    (
        operations.PUSH, operations.PUSH_PLAIN, operations.WITHDRAW, plain_list.LIST_PUSH, operations.AWAIT_RESULT,
        operations.FORGET, operations.CANCEL, inspection.GET_JOB, inspection.COUNTS, partitions.CLAIM_PARTITIONS, partitions.COUNT,
    ),
    (*_RUN, "sadd", "smembers", "subscribe", "ping"),
    channels=True,
)  # fmt: skip
_WORKER = Role(
    "worker",
    "runs jobs and consumes messages, and may push and enqueue as a producer",
    (
        operations.TURN, operations.REGISTER, operations.HEARTBEAT, operations.REAP, operations.EXTEND, operations.HELD_IDS,
        operations.LIST_INTAKE, operations.WAKE, spawn_outbox.TAKE, spawn_outbox.TRIM,
    ),
    ("blpop", "blmove", "info"),
).and_(_PRODUCER)  # fmt: skip
_DASHBOARD = Role(
    "dashboard",
    "looks: status, doctor, lists of queues, jobs and workers; changes nothing",
    (
        inspection.COUNTS,
        inspection.LIST_JOBS,
        inspection.GET_JOB,
        inspection.WORKERS,
        inspection.AUDIT,
        partitions.COUNT,
    ),
    (*_RUN, "smembers", "llen", "hget", "ping", "info", "time"),
)
_OPERATOR = Role(
    "operator",
    "looks, and acts on queues and jobs: pause, purge, redrive, retry, cancel, delete",
    (
        operations.CONFIGURE, operations.PURGE, operations.LIST_INTAKE, operations.REDRIVE, operations.PROMOTE,
        operations.CANCEL, partitions.CLAIM_PARTITIONS, partitions.REPARTITION,
    ),
    ("sadd", "srem", "hscan"),
    channels=True,
).and_(_DASHBOARD)  # fmt: skip
_SENTINEL = Role(
    "sentinel",
    "for the sentinels' own users: asks them who is the master (sentinel_username= in the URL)",
    (),
    ("sentinel|get-master-addr-by-name", "sentinel|masters"),
)
ROLES: dict[str, Role] = {role.name: role for role in (_PRODUCER, _WORKER, _DASHBOARD, _OPERATOR, _SENTINEL)}


@dataclass(frozen=True)
class AclRules:
    """What one user may do: the commands (lower case, sorted), the patterns of its keys and of its channels."""

    role: str
    user: str
    keys: tuple[str, ...]
    channels: tuple[str, ...]
    commands: tuple[str, ...]

    @property
    def text(self) -> str:
        """The rules behind the user's name; whatever the user was allowed before is taken away first."""
        words = [
            "reset", "on", PASSWORD, "resetchannels", *(f"~{one}" for one in self.keys),
            *(f"&{one}" for one in self.channels), *(f"+{one}" for one in self.commands),
        ]  # fmt: skip
        return " ".join(words)

    @property
    def command(self) -> str:
        """One line for redis-cli."""
        return f"ACL SETUSER {self.user} {self.text}"

    @property
    def line(self) -> str:
        """One line for redis.conf or for a file of users."""
        return f"user {self.user} {self.text}"


def rules(
    role: str,
    namespace: str,
    *,
    user: str | None = None,
    lists: Sequence[str] = (),
    server: str = SERVERS[0],
    topology: str = TOPOLOGIES[0],
    database: int = 0,
    durable: bool = False,
) -> AclRules:
    """
    Return the least that *role* needs in *namespace*; raises ConfigurationError for a name that cannot be.

    *lists* are the app's plain lists. The rules for *server* 6.2 are understood by every later one too; those for
    7.2 know what older ones refuse. *topology* and *database* say how the clients connect, *durable* that pushes ask
    for `fsync` or `wait_replicas`.
    """
    found = ROLES.get(role)
    if found is None:
        raise ConfigurationError(f"There is no role {role!r}. Known: {', '.join(ROLES)}.")
    check_namespace(namespace)
    user = user or f"{namespace}-{role}"
    if not _USER.fullmatch(user):
        raise ConfigurationError(f"The name of a user has 1 to 64 of A-Z a-z 0-9 _ . : @ - and nothing else: {user!r}.")
    names = {command for script in found.scripts for command in commands_of(script)} | set(found.commands)
    if found is _SENTINEL:
        return AclRules(role, user, (), (), tuple(sorted(names | _connecting(server, TOPOLOGIES[0], 0))))
    names |= _connecting(server, topology, database)
    if durable:
        # The settings tell whether a reply, or WAITAOF, means that it is on disk.
        names |= {"wait", "info", "config|get", *(["waitaof"] if server == "7.2" else [])}
    return AclRules(
        role, user, (f"{namespace}:queues", f"{namespace}:{{*}}:*", *(_pattern(one) for one in lists)),
        (f"{namespace}:replies:*",) if found.channels else (), tuple(sorted(names)),
    )  # fmt: skip


def _connecting(server: str, topology: str, database: int) -> set[str]:
    """Return what a client sends before its first command. AUTH and HELLO are open to everybody."""
    found = {"client|setinfo"} if server == "7.2" else set()  # older servers refuse the whole line for this one
    if database:
        found.add("select")
    if topology == "sentinel":
        found.add("role")
    if topology == "cluster":
        found |= {"cluster|info", "cluster|slots", "asking"}
    return found


def commands_of(script: Script) -> set[str]:
    """Return the commands that *script* may call, in lower case; a function that it never calls adds none."""
    functions = {one[1]: one[0] for one in _FUNCTION.finditer(script.text)}
    found, seen, texts = set[str](), set[str](), [_FUNCTION.sub("", script.text)]
    while texts:
        text = texts.pop()
        for expression in (*_CALL.findall(text), *_PASSED.findall(text)):
            found.update(_LITERAL.findall(expression))
        for name, function in functions.items():
            if name not in seen and re.search(rf"\b{name}\(", text):
                seen.add(name)
                texts.append(function)
    return {command.lower() for command in found}


def _pattern(name: str) -> str:
    """Return a pattern for one key: what a pattern or a line would read as something else is any one byte."""
    return _UNSAFE.sub(lambda found: "?" * len(found[0].encode()), name)
