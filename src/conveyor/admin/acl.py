"""
ACL rules of least privilege for each kind of program.

A role names its scripts and the commands that it sends besides. The commands of a script are read from its text,
because Redis checks commands, keys and channels inside a script against the user that runs it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from conveyor.errors import ConfigurationError
from conveyor.messaging import outbox
from conveyor.store import (
    inspection,
    limits,
    operations,
    partitions,
    plain_list,
    queue_events,
    schedules,
    streams,
    topics,
    worker_commands,
)
from conveyor.store.keys import check_namespace
from conveyor.store.script import Script

PASSWORD = "#SHA256-OF-THE-PASSWORD"  # noqa: S105  Redis refuses this text, so no user gets a known password
SERVERS = ("6.2", "7.0", "7.2")
TOPOLOGIES = ("standalone", "sentinel", "cluster")

_USER = re.compile(r"[A-Za-z0-9_.:@-]{1,64}")
_UNSAFE = re.compile(r"[^A-Za-z0-9_.:@/{}=+-]")  # special in a key pattern, or on a line of redis-cli
_FUNCTION = re.compile(r"^local function (\w+)(?:[^\n]*\bend$|.*?^end$)", re.MULTILINE | re.DOTALL)
_CALL = re.compile(r"redis\.p?call\(([^,()]*)")
# As in check('HLEN', key), which calls its argument.
_PASSED_ARGUMENTS = re.compile(r"(?<!redis\.)(?<!redis\.p)\b(?!redis)\w+\(([^()]*)")
_COMMAND_NAME = re.compile(r"'([A-Z]{2,})'")


class Role(msgspec.Struct, frozen=True):
    """
    A kind of program, with the scripts and commands that it uses.

    `channels`: whether it publishes or receives messages about results.
    """

    name: str
    description: str
    scripts: tuple[Script, ...] = ()
    commands: tuple[str, ...] = ()
    channels: bool = False

    def combined_with(self, other: Role) -> Role:
        """Return this role with the rights of *other* added."""
        return Role(
            self.name, self.description, (*self.scripts, *other.scripts), (*self.commands, *other.commands),
            self.channels or other.channels,
        )  # fmt: skip


_RUN_SCRIPT = ("evalsha", "eval")
_PRODUCER = Role(
    "producer",
    "pushes and enqueues, reads status and results, finds and cancels jobs; leases nothing",
    (
        operations.PUSH, operations.PUSH_PLAIN, operations.WITHDRAW, operations.LEAVE_ROOM, plain_list.LIST_PUSH,
        operations.AWAIT_RESULT, operations.FORGET,
        operations.CANCEL, operations.UPDATE, streams.READ_STREAM, queue_events.READ_EVENTS, inspection.WATCH_JOBS,
        inspection.GET_JOB, inspection.WHY, inspection.COUNTS, partitions.CLAIM_PARTITIONS,
        inspection.FIND_JOBS, partitions.COUNT, topics.PUBLISH, topics.SUBSCRIBE, topics.SUBSCRIBERS,
        limits.DECLARE_LIMITS, operations.DECLARE_QUEUE, schedules.SCHEDULE_PUT, schedules.SCHEDULE_CHANGE, schedules.SCHEDULE_READ,
    ),
    (*_RUN_SCRIPT, "hgetall", "hget", "hdel", "hsetnx", "sadd", "smembers", "subscribe", "ping", "zcard",
     "smismember", "exists", "srem", "zadd", "zrange", "zrem", "pttl", "lrange"),
    channels=True,
)  # fmt: skip
_WORKER = Role(
    "worker",
    "runs jobs and consumes messages, and may push and enqueue as a producer",
    (
        operations.TURN, operations.REGISTER, operations.HEARTBEAT, operations.REAP, operations.EXTEND, operations.HELD_IDS,
        operations.IDLE_TURN, operations.FIND_WORK, operations.LIST_INTAKE, operations.WAKE, outbox.TAKE, outbox.TRIM,
        schedules.SCHEDULE_FIRE, worker_commands.DESCRIBE_WORKER, streams.EMIT,
    ),
    ("blpop", "blmove", "info", "set"),
).combined_with(_PRODUCER)  # fmt: skip
_DASHBOARD = Role(
    "dashboard",
    "reads status, doctor, and lists of queues, jobs and workers; changes nothing",
    (
        inspection.COUNTS,
        inspection.COUNT_QUEUES,
        inspection.READ_STATS,
        inspection.LIST_JOBS,
        inspection.FIND_JOBS,
        inspection.GET_JOB,
        inspection.WHY,
        inspection.QUEUE_CAUSES,
        inspection.READ_TOTALS,
        inspection.EXAMINE_QUEUES,
        inspection.WORKERS,
        worker_commands.LEASED_JOBS,
        inspection.AUDIT,
        partitions.COUNT,
        limits.LIST_LIMITS,
    ),
    (*_RUN_SCRIPT, "hgetall", "smembers", "llen", "hget", "ping", "info", "time", "xrevrange", "lrange"),
)
_OPERATOR = Role(
    "operator",
    "reads, and acts on queues and jobs: pause, purge, redrive, repair, retry, cancel, delete",
    (
        operations.CONFIGURE, operations.PURGE, operations.LIST_INTAKE, operations.REDRIVE,
        operations.PROMOTE, operations.UPDATE,
        operations.CANCEL, partitions.CLAIM_PARTITIONS, partitions.REPARTITION, inspection.UNPLACED, operations.REPAIR,
        operations.DELETE, topics.SUBSCRIBE, limits.SET_LIMITS, worker_commands.COMMAND_WORKER, worker_commands.RELEASE_BUILD,
    ),
    ("get", "sadd", "srem", "hscan", "scan", "exists", "del", "zadd", "zrange", "zrem", "zcard", "pttl", "xadd", "expire"),
    channels=True,
).combined_with(_DASHBOARD)  # fmt: skip
_SENTINEL = Role(
    "sentinel",
    "for the users of the sentinels themselves: asks which server is the master (sentinel_username= in the URL)",
    (),
    ("sentinel|get-master-addr-by-name", "sentinel|masters"),
)
_COMMON_KEYS = ("queues", "expiring", "outboxes", "schedules", "redaction")
_OWN_KEYS = {"dashboard": ("audit", "marks"), "operator": ("audit", "marks")}
"""Keys of the namespace that a role has besides those of all."""
ROLES: dict[str, Role] = {role.name: role for role in (_PRODUCER, _WORKER, _DASHBOARD, _OPERATOR, _SENTINEL)}


class AclRules(msgspec.Struct, frozen=True):
    """The rights of one user: commands (lower case, sorted), key patterns and channel patterns."""

    role: str
    user: str
    keys: tuple[str, ...]
    channels: tuple[str, ...]
    commands: tuple[str, ...]

    @property
    def text(self) -> str:
        """
        The rules that follow the user's name.

        They begin with `reset`, which removes all earlier rights.
        """
        words = [
            "reset", "on", PASSWORD, "resetchannels", *(f"~{one}" for one in self.keys),
            *(f"&{one}" for one in self.channels), *(f"+{one}" for one in self.commands),
        ]  # fmt: skip
        return " ".join(words)

    @property
    def command(self) -> str:
        """The line for redis-cli."""
        return f"ACL SETUSER {self.user} {self.text}"

    @property
    def line(self) -> str:
        """The line for redis.conf or for an ACL file."""
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
    Return the least rights that *role* needs in *namespace*.

    *lists*: the app's plain lists. *server*: the oldest server that must accept the rules; rules for 6.2 work on every
    later one, rules for 7.2 hold commands that older servers refuse. *topology*, *database*: how clients connect.
    *durable*: pushes use `fsync` or `wait_replicas`. Raises ConfigurationError for an invalid name.
    """
    definition = ROLES.get(role)
    if definition is None:
        raise ConfigurationError(f"There is no role {role!r}. Known: {', '.join(ROLES)}.")
    check_namespace(namespace)
    user = user or f"{namespace}-{role}"
    if not _USER.fullmatch(user):
        raise ConfigurationError(f"Invalid user name {user!r}: use 1 to 64 characters out of A-Z a-z 0-9 _ . : @ -")
    names = {command for script in definition.scripts for command in commands_of(script)} | set(definition.commands)
    if definition is _SENTINEL:
        return AclRules(role, user, (), (), tuple(sorted(names | _connection_commands(server, TOPOLOGIES[0], 0))))
    if (
        topology == "cluster" and definition is _PRODUCER
    ):  # which delivers the copies of what it publishes over the nodes
        names |= commands_of(outbox.TAKE) | commands_of(outbox.TRIM)
    names |= _connection_commands(server, topology, database)
    if durable:
        # A client reads the settings to learn whether a reply, or WAITAOF, proves that data is on disk.
        names |= {"wait", "info", "config|get", *(["waitaof"] if server == "7.2" else [])}
    return AclRules(
        role, user,
        (
            *(f"{namespace}:{one}" for one in (*_COMMON_KEYS, *_OWN_KEYS.get(role, ()), "{*}:*")),
            *(_key_pattern(one) for one in lists),
        ),
        (f"{namespace}:replies:*",) if definition.channels else (), tuple(sorted(names)),
    )  # fmt: skip


def _connection_commands(server: str, topology: str, database: int) -> set[str]:
    """Return the commands that open a connection. AUTH and HELLO need no right."""
    # Older servers do not know it and refuse the whole line.
    commands = {"client|setinfo"} if server == "7.2" else set()
    if database:
        commands.add("select")
    if topology == "sentinel":
        commands.add("role")
    if topology == "cluster":
        commands |= {"cluster|info", "cluster|slots", "asking"}
    return commands


def commands_of(script: Script) -> set[str]:
    """
    Return the commands that *script* may call, in lower case.

    A function that the script never calls adds none.
    """
    code = script.code
    functions = {one[1]: one[0] for one in _FUNCTION.finditer(code)}
    commands, seen, texts = set[str](), set[str](), [_FUNCTION.sub("", code)]
    while texts:
        text = texts.pop()
        for expression in (*_CALL.findall(text), *_PASSED_ARGUMENTS.findall(text)):
            commands.update(_COMMAND_NAME.findall(expression))
        for name, function in functions.items():
            if name not in seen and re.search(rf"\b{name}\(", text):
                seen.add(name)
                texts.append(function)
    return {command.lower() for command in commands}


def _key_pattern(name: str) -> str:
    """
    Return a key pattern that matches *name*.

    `?` (any one byte) stands for each byte that is special in a pattern or on a line of redis-cli.
    """
    return _UNSAFE.sub(lambda match: "?" * len(match[0].encode()), name)
