"""
Declarations of limits and groups: their names, the text that Redis keeps, and the keys of one job or message.

A limit is declared for a queue or a task and kept in the settings of the queue. A queue in N partitions splits it: each
partition gets its Nth part, unless the key of the limit is the group, which picks the partition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, get_origin, is_typeddict

import msgspec

from conveyor.errors import ConfigurationError, PayloadError, StoreUnavailable
from conveyor.messaging.limits import Concurrency, Rate
from conveyor.messaging.push_options import LoadKeys, Outgoing
from conveyor.payload.codec import show
from conveyor.payload.key_text import group_key, key_text, member_reader
from conveyor.store import limits as store_limits
from conveyor.units import shortest_text

if TYPE_CHECKING:
    from conveyor.store.client.client import Client
    from conveyor.store.keys import QueueKeys
    from conveyor.store.script import Call, CallProgram

Reader = Callable[[Outgoing], Any]
"""Reads a key or a cost from a job or a message on its way out; None: it has no such key."""
FindReader = Callable[[str, str], Reader]
"""Returns the reader of a path; the second text names in errors what holds the path. Raises ConfigurationError."""


class DeclaredLimit(msgspec.Struct, frozen=True):
    """A limit of a queue or a task, with the name that it has in the queue. `exact`: its key picks the partition."""

    name: str
    limit: Rate | Concurrency
    owner: str
    exact: bool = False

    def count(self, partitions: int = 1) -> int:
        """Return the number that holds in each of so many partitions."""
        return self.limit.n if self.exact else self.limit.n // partitions

    def text(self, partitions: int = 1) -> str:
        """Return the limit as the settings of a queue, or of one of its partitions, hold it: ``+`` where it is not split."""
        whole = "+" if self.exact and partitions > 1 else ""
        cost = f"/{self.limit.cost}" if isinstance(self.limit, Rate) and self.limit.cost else ""
        return f"{limit_text(self.limit, self.count(partitions))} {whole}{self.limit.by or '-'}{cost}"

    def check_partitions(self, queue: str, partitions: int) -> None:
        """Raise ConfigurationError when the parts of the limit would be below one."""
        if self.count(partitions) == 0:
            advice = (
                ""
                if self.limit.by is None
                else " Or make its key the group (group_by, or by='group'), which picks the partition, so that it is not split."
            )
            raise ConfigurationError(
                f"{show_limit(self.limit)} of {self.owner} is smaller than the {partitions} partitions of queue {queue!r}: each "
                f"partition gets its part, and needs at least 1. Raise it, or declare fewer partitions.{advice}"
            )


def held_limit(limits: Iterable[str], group: str | None, declared: Mapping[str, DeclaredLimit]) -> str | None:
    """
    Return the limit, with its key, that holds until a service takes more: the first rate, else the first, else the group.

    *limits* are those of a job, as in `Entry.limits`. None: it has neither.
    """
    names = [text.partition(":")[2] for text in limits]
    rates = [one for one in names if (known := declared.get(one.partition(":")[0])) and isinstance(known.limit, Rate)]
    return next(iter([*rates, *names, *([] if group is None else [f":{group}"])]), None)


class Charge(NamedTuple):
    """The cost of a job at a limit, with its key, *beyond* the *cost* that it was pushed with."""

    limit: str
    beyond: int
    cost: int


def charge_of(limit: str, charges: Mapping[str, int]) -> Charge | None:
    """Return what a job has cost at *limit* (as in `Entry.limits`) by the *charges* that it told; None: it told none."""
    cost, _, name = limit.partition(":")
    true = charges.get(name.partition(":")[0])
    return None if true is None else Charge(name, true - int(cost), int(cost))


def cost_arguments(declared: Iterable[DeclaredLimit]) -> dict[str, str]:
    """Return the argument that says the cost of each limit with one, by its name."""
    return {one.name: one.limit.cost for one in declared if isinstance(one.limit, Rate) and one.limit.cost is not None}


def queue_owner(queue: str) -> str:
    """Return the owner of the limits that a queue itself declares."""
    return f"queue {queue}"


def task_owner(task: str) -> str:
    """Return the owner of the limits of a task."""
    return f"task {task}"


def limit_text(limit: Rate | Concurrency, count: int) -> str:
    """Return a limit of *count* as a script reads it."""
    return f"c {count}" if isinstance(limit, Concurrency) else f"r {count} {limit.per_ms} {int(limit.smooth)}"


def read_limit(text: str, declared: str = "") -> Rate | Concurrency:
    """Return the limit that the settings of a queue hold; an operator's, which has no keys, with those of the *declared* one."""
    kind, n, *words = text.split()
    keys = (declared or text).rpartition(" ")[2].removeprefix("+") if declared or len(words) in {1, 3} else "-"
    by, _, cost = keys.partition("/")
    path = None if by == "-" else by
    if kind == "c":
        return Concurrency(int(n), by=path)
    smooth = words[1] == "1" and not cost  # an earlier version took both together
    return Rate(int(n), shortest_text(int(words[0])), by=path, cost=cost or None, smooth=smooth)


def show_limit(limit: Rate | Concurrency) -> str:
    """Return a limit as people write it, without the options that have their defaults."""
    words = [str(limit.n)]
    given: dict[str, object] = {"by": limit.by, "name": limit.name}
    if isinstance(limit, Rate):
        words.append(repr(limit.per))
        given |= {"cost": limit.cost, "smooth": limit.smooth or None}
    words += [f"{name}={value!r}" for name, value in given.items() if value is not None]
    return f"{type(limit).__name__}({', '.join(words)})"


def short_limit(limit: Rate | Concurrency) -> str:
    """Return a limit as the command line has it: ``500/1m``, ``50``."""
    return f"{limit.n}/{shortest_text(limit.per_ms)}" if isinstance(limit, Rate) else str(limit.n)


def parse_limit(text: str, *, smooth: bool = False) -> Rate | Concurrency:
    """Return the limit that *text* stands for: ``500/1m`` or ``50``. Raises ConfigurationError."""
    number, slash, per = text.partition("/")
    count = number.replace("_", "").replace(",", "")
    if not (count.isascii() and count.isdigit() and len(count) < 20) or (slash and not per) or (smooth and not slash):
        raise ConfigurationError(
            f"A limit is a rate such as 500/1m, or a concurrency such as 50, not {text!r}. --smooth needs a rate."
        )
    return Rate(int(count), per, smooth=smooth) if slash else Concurrency(int(count))


def declare_limits(
    owner: str, limits: Iterable[Rate | Concurrency] | None, *, prefix: str = "", group_by: str | None = None
) -> tuple[DeclaredLimit, ...]:
    """
    Check the limits of *owner* (``task mail.send``) and return them with their names. Raises ConfigurationError.

    A limit without a name is called by its kind and its `by`, behind *prefix*. *group_by* is the path of the group key.
    """
    if limits is None:
        return ()
    if isinstance(limits, Rate | Concurrency) or not isinstance(limits, Iterable):
        raise ConfigurationError(f"limits of {owner} must be a list: limits=[{_shown(limits)}].")
    declared: dict[str, DeclaredLimit] = {}
    for limit in limits:
        if not isinstance(limit, Rate | Concurrency):
            raise ConfigurationError(
                f'limits of {owner} takes Rate(…) and Concurrency(…), such as limits=[Rate(100, "1s")], not {_shown(limit)}.'
            )
        name, number = limit.name or default_name(limit, prefix), 1
        while limit.name is None and name in declared:
            number += 1
            name = f"{default_name(limit, prefix)}-{number}"
        if name in declared:
            raise ConfigurationError(f"Two limits of {owner} are called {name!r}. Give each a name of its own.")
        exact = limit.by is not None and limit.by in {"group", group_by}
        declared[name] = DeclaredLimit(name, limit, owner, exact)
    return tuple(declared.values())


def default_name(limit: Rate | Concurrency, prefix: str = "") -> str:
    """Return the name of a limit that has none of its own."""
    words = [prefix.replace(":", "."), limit.kind, limit.by]
    return ".".join(word for word in words if word)


def check_together(known: DeclaredLimit, other: DeclaredLimit) -> None:
    """Raise ConfigurationError for two declarations of one name in one queue that do not say the same."""
    if known.owner == other.owner:
        return
    if known.limit.name is None or other.limit.name is None:
        raise ConfigurationError(
            f"The limits {show_limit(known.limit)} of {known.owner} and {show_limit(other.limit)} of {other.owner} would both be "
            f'called {other.name!r} in their queue. Give each a name: {type(other.limit).__name__}(…, name="…").'
        )
    if known.text() != other.text() or known.exact != other.exact:
        raise ConfigurationError(
            f"The limit {other.name!r} is declared twice, differently: {show_limit(known.limit)} by {known.owner}, and "
            f"{show_limit(other.limit)} by {other.owner}. Declare it once, as a value that both use, or give one another name."
        )


class LoadKeyReader:
    """Reads the group key and the limits of the jobs of a task, or of the messages of a queue."""

    def __init__(
        self, declared: Sequence[DeclaredLimit], find: FindReader, *, group_by: str | None = None, partitions: int = 1
    ) -> None:
        """Find the readers of all keys and costs by *find*. Raises ConfigurationError for a path that names nothing."""
        self.declared = tuple(declared)
        self._group = None if group_by is None else find(group_by, "group_by")
        self._limits = tuple(_LimitReader(one, find, one.count(partitions)) for one in self.declared)
        fixed = tuple(one.fixed for one in self._limits if one.fixed is not None)
        self.fixed: tuple[str, ...] | None = fixed if group_by is None and len(fixed) == len(self._limits) else None
        """The limits of every job or message, where they do not depend on what it holds."""

    def read(self, outgoing: Outgoing) -> LoadKeys:
        """Return the keys of a job or message; raises PayloadError for a value that is no key, or no possible cost."""
        if outgoing.group is None and self._group is not None and (value := self._group(outgoing)) is not None:
            outgoing.group = key_text(value, "The group key")
        elif outgoing.group is not None:
            outgoing.group = group_key(outgoing.group)
        return LoadKeys(outgoing.group, tuple(text for one in self._limits if (text := one.read(outgoing))))


class _LimitReader:
    """Reads the key and the cost of one limit. `most`: what one job may cost at most."""

    __slots__ = ("_cost", "_declared", "_key", "_most", "fixed")

    def __init__(self, declared: DeclaredLimit, find: FindReader, most: int) -> None:
        limit, kind = declared.limit, type(declared.limit).__name__
        self._declared, self._most = declared, most
        self._key = None if limit.by is None else find(limit.by, f"{kind}(by)")
        cost = limit.cost if isinstance(limit, Rate) else None
        self._cost = None if cost is None else find(cost, f"{kind}(cost)")
        self.fixed = f"1:{declared.name}" if self._key is None and self._cost is None else None

    def read(self, outgoing: Outgoing) -> str | None:
        """Return the limit as an envelope holds it; None for a job without this key, or that costs nothing."""
        if self.fixed is not None:
            return self.fixed
        cost = 1 if self._cost is None else self._checked_cost(self._cost(outgoing))
        if cost == 0:
            return None
        if self._key is None:
            return f"{cost}:{self._declared.name}"
        key = self._key(outgoing)
        if key is None:
            return None
        return f"{cost}:{self._declared.name}:{key_text(key, f'The key of {show_limit(self._declared.limit)}')}"

    def _checked_cost(self, cost: Any) -> int:
        limit = self._declared.limit
        if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 <= cost < math.inf:
            raise PayloadError(
                f"The cost of {show_limit(limit)} of {self._declared.owner} must be a number of at least 0, not {show(cost)}. "
                "Nothing was stored.",
                code="E03",
            )
        whole = math.ceil(cost)
        if whole > self._most:
            part = "" if self._most == limit.n else f", of which each partition has {self._most:,}"
            raise PayloadError(
                f"A cost of {whole:,} is above {show_limit(limit)} of {self._declared.owner}{part}: it could never start. "
                "Raise the limit, or split the job. Nothing was stored.",
                code="E03",
            )
        return whole


def message_reader(queue: str, type_: Any) -> FindReader:
    """Return what finds the readers for messages of *queue*: a field, ``headers.NAME``, or ``group``."""

    def find(path: str, what: str) -> Reader:
        head, *rest = path.split(".")
        if path == "group":
            return lambda outgoing: outgoing.group
        if head == "headers" and rest:
            header = ".".join(rest)
            return lambda outgoing: outgoing.headers.get(header)
        known = _fields(type_)
        if known is not None and head not in known:
            from difflib import get_close_matches

            close = get_close_matches(head, known, 1)
            meant = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigurationError(
                f"{what} of queue {queue!r} names {head!r}, which is no field of {_shown(type_)}.{meant} It names a field, "
                '"headers.NAME" or "group".'
            )
        follow = member_reader((head, *rest))

        def read(outgoing: Outgoing) -> Any:
            try:
                return follow(outgoing.body)
            except LookupError:
                raise PayloadError(
                    f"{what} of queue {queue!r} names {path!r}, which this message does not have: {show(outgoing.body)}. "
                    "Nothing was stored.",
                    code="E03",
                ) from None

        return read

    return find


def job_reader(find_argument: Callable[[str, str], Callable[[tuple[Any, ...], dict[str, Any]], Any]]) -> FindReader:
    """
    Return what finds the readers for jobs of a task: an argument, else ``headers.NAME`` or ``group``.

    *find_argument* is `TaskSignature.argument_reader`.
    """

    def find(path: str, what: str) -> Reader:
        head, _, rest = path.partition(".")
        try:
            argument = find_argument(path, what)
        except ConfigurationError:
            if path == "group":
                return lambda outgoing: outgoing.group
            if head == "headers" and rest:
                return lambda outgoing: outgoing.headers.get(rest)
            raise
        return lambda outgoing: argument(outgoing.args, outgoing.kwargs)

    return find


def _fields(type_: Any) -> list[str] | None:
    """Return the names of the fields of a type; None where only the values tell."""
    type_ = get_origin(type_) or type_
    if not isinstance(type_, type):
        return None
    if is_dataclass(type_):
        return [field.name for field in fields(type_)]
    if is_typeddict(type_):
        return list(type_.__annotations__)
    for name in ("__struct_fields__", "_fields"):
        if isinstance(found := getattr(type_, name, None), tuple):
            return list(found)
    found = getattr(type_, "model_fields", None)
    if isinstance(found, Mapping):
        return list(found)
    if issubclass(type_, str | int | float | bool | bytes | list | tuple):
        return []
    return None


def _shown(value: object) -> str:
    return show_limit(value) if isinstance(value, Rate | Concurrency) else show(value)


class QueueLimits:
    """
    The limits that a program declares in one queue: the queue's own, and those of tasks whose jobs it holds.

    A producer tells them to each partition once, where nothing is stored; a worker or consumer each time it registers.
    """

    def __init__(self, client: Client, queue: str, partitions: int = 1) -> None:
        self.client, self.queue, self.partitions = client, queue, partitions
        self.owners: dict[str, tuple[DeclaredLimit, ...]] = {}
        self._told: set[str] = set()
        self._declared: set[str] = set()

    def add(self, owner: str, declared: tuple[DeclaredLimit, ...]) -> None:
        """Add the limits of *owner*, in place of those it had. Raises ConfigurationError."""
        for one in declared:
            one.check_partitions(self.queue, self.partitions)
            for other, its_limits in self.owners.items():
                for known in its_limits if other != owner else ():
                    if known.name == one.name:
                        check_together(known, one)
        if declared:
            self.owners[owner] = declared
            self._told.clear()
            self._declared.clear()

    def of(self, owner: str) -> tuple[DeclaredLimit, ...]:
        """Return the limits of *owner*."""
        return self.owners.get(owner, ())

    def all(self) -> dict[str, DeclaredLimit]:
        """Return the limits by their names."""
        return {one.name: one for declared in self.owners.values() for one in declared}

    def declaration(self, keys: QueueKeys, *, replace: bool = True) -> Call[dict[str, str]] | None:
        """Return the call that declares them in a queue or partition; None: there are none."""
        texts = {name: one.text(self.partitions) for name, one in self.all().items()}
        return store_limits.declare_limits(keys, texts, replace=replace) if texts else None

    def declare(self, keys: QueueKeys, *, anew: bool = False) -> CallProgram[None]:
        """
        Declare them for a worker or a consumer, whose numbers hold: once for each place, or *anew* where Redis was emptied.

        Raises ConfigurationError.
        """
        if (anew or keys.queue not in self._declared) and (call := self.declaration(keys)) is not None:
            self.check((yield call))
            self._declared.add(keys.queue)

    def check(self, refused: dict[str, str]) -> None:
        """Raise ConfigurationError for the limits that are stored otherwise than this program declares them."""
        for name, stored in refused.items():
            one = self.all()[name]
            raise ConfigurationError(
                f"Limit {name!r} of queue {self.queue!r} is {show_limit(read_limit(stored))} in another program, and "
                f"{show_limit(one.limit)} of {one.owner} in this one. Declare it alike in both, or give one another name: "
                f'{type(one.limit).__name__}(…, name="…"). Nothing was changed.'
            )

    def ensure(self, keys: QueueKeys) -> None:
        """
        Declare the limits in a queue or partition that this process has not told them to.

        A server that does not answer is left to the worker, which declares them before it leases. Raises ConfigurationError.
        """
        if keys.queue not in self._told and (call := self.declaration(keys, replace=False)) is not None:
            try:
                self.check(self.client.run(call, retry_for=0))
            except StoreUnavailable:
                return
            self._told.add(keys.queue)

    async def aensure(self, keys: QueueKeys) -> None:
        """Awaitable form of `ensure`."""
        if keys.queue not in self._told and (call := self.declaration(keys, replace=False)) is not None:
            try:
                self.check(await self.client.arun(call, retry_for=0))
            except StoreUnavailable:
                return
            self._told.add(keys.queue)
