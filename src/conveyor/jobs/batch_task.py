"""Batch tasks: jobs are enqueued one by one, and the function receives a list of them."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, Union, overload

import msgspec

from conveyor.errors import BatchFailed, ConfigurationError, PayloadError
from conveyor.jobs.dependencies import is_injected
from conveyor.jobs.task import UNRUN, BatchPlan, Task, not_run
from conveyor.payload.codec import show
from conveyor.payload.parameters import payload_type, read_parameters
from conveyor.store.operations import MOST_HELD
from conveyor.units import Duration, positive_ms, quantity

T = TypeVar("T")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
F_co = TypeVar("F_co", covariant=True)
ItemEnd = tuple[Any, BaseException | None]
"""The end of one item of a batch: its result, or its error."""

_EMPTY = inspect.Parameter.empty
_LISTS = (list, collections.abc.Sequence, collections.abc.Collection, collections.abc.Iterable)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class BatchMisreported(PayloadError):
    """The function of a batch said something of its items that does not fit them: their work is done, and not known."""


class BatchTask(Task[[T], R_co], Generic[T, R_co, F_co]):
    """A task whose jobs are enqueued one by one, and whose function takes a list of them and returns *F_co*."""

    if TYPE_CHECKING:

        def __call__(self, items: list[T], /) -> F_co: ...  # type: ignore[override]  # a list; `enqueue` takes one of it


class BatchDecorator(Protocol):
    """The decorator that `@app.batch_task(…)` returns."""

    @overload
    def __call__(
        self, function: Callable[[list[T]], Coroutine[Any, Any, list[R]]], /
    ) -> BatchTask[T, R, Coroutine[Any, Any, list[R]]]: ...
    @overload
    def __call__(
        self, function: Callable[[list[T]], Coroutine[Any, Any, None]], /
    ) -> BatchTask[T, None, Coroutine[Any, Any, None]]: ...
    @overload
    def __call__(
        self, function: Callable[[list[T]], Coroutine[Any, Any, list[R] | None]], /
    ) -> BatchTask[T, R | None, Coroutine[Any, Any, list[R] | None]]: ...
    @overload
    def __call__(self, function: Callable[[list[T]], list[R]], /) -> BatchTask[T, R, list[R]]: ...
    @overload
    def __call__(self, function: Callable[[list[T]], None], /) -> BatchTask[T, None, None]: ...
    @overload
    def __call__(self, function: Callable[[list[T]], list[R] | None], /) -> BatchTask[T, R | None, list[R] | None]: ...


def batch_plan(size: object, within: Duration, group_by: object) -> BatchPlan:
    """Return when the jobs of a batch task run, checked; raises ConfigurationError."""
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MOST_HELD:
        raise ConfigurationError(
            f"@app.batch_task(size=…) must be a whole number from 1 to {MOST_HELD:,}, not {show(size)}: so many jobs of a "
            "queue one worker may hold."
        )
    within_ms = positive_ms(within, "@app.batch_task(within=…)")
    steps = group_by.split(".") if isinstance(group_by, str) else [""]
    if group_by is not None and not all(step.isidentifier() for step in steps):
        raise ConfigurationError(
            f'@app.batch_task(group_by=…) must be the name of a field of the items, such as "tenant", not {show(group_by)}.'
        )
    return BatchPlan(size, within_ms, typing.cast("str | None", group_by))


def item_function(function: Callable[..., Any], name: str, plan: BatchPlan) -> Callable[..., Any]:
    """
    Return a function with the signature of one job of a batch task: one item in, its result out.

    It is read and never called. Raises ConfigurationError for a *function* that does not take exactly one list, or that
    returns something else than a list or None.
    """
    parameters, result = read_parameters(function, name, is_injected)
    taken = [one for one in parameters if not is_injected(one)]
    if len(taken) != 1 or taken[0].kind not in _POSITIONAL or taken[0].default is not _EMPTY:
        given = ", ".join(str(one) for one in taken) or "nothing"
        raise ConfigurationError(
            f"{name}(): the function of a batch task takes exactly one list, by position and without a default, and this one "
            f"takes {given}.\n    Write:  def {_bare(name)}(items: list[Order]): …   and enqueue one Order at a time."
        )
    item = _item_type(taken[0], name)
    _check_field(plan.group_by, payload_type(item), name)

    def one() -> None: ...

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    kept = [one.replace(annotation=item, kind=kind) if one is taken[0] else one for one in parameters]
    vars(one)["__signature__"] = inspect.Signature(kept, return_annotation=_result_type(result, name))
    one.__name__ = getattr(function, "__name__", name)
    return one


def item_ends(value: Any, error: BaseException | None, count: int) -> list[ItemEnd]:
    """Return how each of *count* items ended, by what the function of their batch returned or raised."""
    if isinstance(error, BatchFailed):
        if wrong := [index for index in error.errors if index >= count]:
            stray = BatchMisreported(
                f"BatchFailed names item {min(wrong)}, and the batch had {quantity(count, 'item')}, counted from 0. All of them "
                "are dead letters: which of them failed is not known."
            )
            return [(None, stray)] * count
        ends = item_ends(error.results, None, count)
        return [(None, error.errors[at]) if at in error.errors else ends[at] for at in range(count)]
    if error is not None:
        return [(None, error)] * count
    if value is None:
        return [(None, None)] * count
    if isinstance(value, list | tuple) and len(value) == count:
        return [(one, None) for one in value]
    if type(value) in UNRUN:
        return [(None, not_run(value))] * count
    what = f"{len(value)} results" if isinstance(value, list | tuple) else f"{show(value)} ({type(value).__name__})"
    mismatch = BatchMisreported(
        f"The function returned {what} for a batch of {quantity(count, 'item')}. Return a list with one result per item, in their "
        "order, or None. The items are dead letters, and not tried again: their work is done."
    )
    return [(None, mismatch)] * count


def _item_type(parameter: inspect.Parameter, name: str) -> Any:
    annotation = parameter.annotation
    if annotation is _EMPTY or annotation is Any:
        return annotation
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if (origin or annotation) in _LISTS:
        return arguments[0] if arguments else Any
    raise ConfigurationError(
        f"{name}(): '{parameter.name}' must be a list of the items, such as list[Order], not "
        f"{inspect.formatannotation(annotation)}."
    )


def _result_type(result: Any, name: str) -> Any:
    """Return the type of one item's result, of a function that returns that annotation."""
    if result in (_EMPTY, None, type(None), Any):
        return result
    origin, arguments = typing.get_origin(result), typing.get_args(result)
    if origin in (Union, types.UnionType):
        lists = [one for one in arguments if one is not type(None)]
        if len(lists) == 1 and len(arguments) == 2:
            return _result_type(lists[0], name) | None
    elif (origin or result) in _LISTS:
        return arguments[0] if arguments else Any
    raise ConfigurationError(
        f"{name}(): the function of a batch task returns a list with one result per item, or None, not "
        f"{inspect.formatannotation(result)}."
    )


def _check_field(group_by: str | None, item: Any, name: str) -> None:
    """Raise ConfigurationError when items of that type can have no such field."""
    if group_by is None:
        return
    first = group_by.partition(".")[0]
    names = _fields(item)
    if names is not None and first not in names:
        has = f"have {', '.join(names)}" if names else "have no fields"
        raise ConfigurationError(
            f"{name}(): group_by={group_by!r} is no field of its items, which are {inspect.formatannotation(item)} and {has}."
        )


def _fields(item: Any) -> Sequence[str] | None:
    """Return the fields of a type; None for one that may have any."""
    if dataclasses.is_dataclass(item):
        return [field.name for field in dataclasses.fields(item)]
    if isinstance(item, type) and issubclass(item, msgspec.Struct):
        return [field.name for field in msgspec.structs.fields(item)]
    if typing.is_typeddict(item):
        return list(item.__annotations__)
    return [] if item in (str, int, float, bool, bytes) else None


def _bare(name: str) -> str:
    return name.rpartition(".")[2]
