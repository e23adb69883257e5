"""The outside of the library: the names that programs import, the members that they see, and the awaitable twins."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest

import conveyor
from conveyor import Context, Conveyor, Message, Outgoing
from conveyor.messaging.message import Batch
from conveyor.sql import Ledger, Outbox
from support.markdown_page import PAGES, ROOT, blocks

REFERENCE = (ROOT / "docs" / "reference" / "api.md").read_text("utf-8")
EVENTS = (ROOT / "docs" / "reference" / "events.md").read_text("utf-8")

NAMES = {
    "conveyor": (
        "BatchFailed BlobStore BlobUnavailable Buffer CallNext Concurrency ConfigurationError Context Conveyor ConveyorError Debounce "
        "Depends Duplicate DurabilityNotReached FileStore Format Job JobCancelled JobFailed JobNotFound LeaseLost Message Middleware "
        "Outgoing PayloadError PlainList Queue QueueFull Rate RateLimited ResultExpired Retry RetryIn Snooze StoreUnavailable "
        "Task Throttle Topic TopicInfo Unique UnknownTask Webhook Why current"
    ),
    "conveyor.errors": (
        "BatchFailed ConfigurationError ConveyorError Duplicate DurabilityNotReached JobCancelled JobFailed JobNotFound "
        "LeaseLost PayloadError QueueFull QueueNotFound RateLimited ResultExpired RetryIn Snooze StoreUnavailable UnknownTask"
    ),
    "conveyor.events": (
        "Event EventsMissed JobCancelledEvent JobDead JobDone JobEnded JobEnqueued JobEvent JobLost JobPromoted JobRedriven JobRetried JobReturned "
        "JobStarted JobUpdate JobUpdated ProgressChanged StateChanged WorkerStarted WorkerStopped"
    ),
    "conveyor.admin": "Admin sweep",
    "conveyor.dashboard": "Access BasicAuth dashboard wsgi_dashboard",
    "conveyor.sql": "Ledger Outbox",
}
"""Names that may be imported, by module: a name that is missing here is not public, one that disappears breaks programs."""

NAMES_OF_EXTRAS = {
    "conveyor.contrib.opentelemetry": "OpenTelemetry instrument",
    "conveyor.contrib.sentry": "Sentry instrument report_dead",
}
"""The same of modules that import what an extra installs; tests/contrib imports them where that is there."""

IMPORT = re.compile(r"^\s*(?:from (conveyor[\w.]*) import ([\w, ]+)|import (conveyor[\w.]*))", re.MULTILINE)


# -- names --------------------------------------------------------------------------------------------------------


def missing_names(names: dict[str, str]) -> list[str]:
    """Return the names that their module lacks."""
    return [
        f"{module}.{name}"
        for module, several in names.items()
        for name in several.split()
        if not hasattr(importlib.import_module(module), name)
    ]


def foreign_imports(text: str) -> list[str]:
    """Return what a program imports from the library beside the public names."""
    names = NAMES | NAMES_OF_EXTRAS
    imports = [
        (module or alone, name.strip())
        for module, several, alone in IMPORT.findall(text)
        for name in (several.split(",") if module else [""])
    ]
    return [f"{module}: {name}" for module, name in imports if name not in ["", *names.get(module, "").split()]] + [
        f"{module}: " for module, name in imports if not name and module not in names
    ]


def test_public_names_are_importable() -> None:
    """Every public name is where programs import it from, and `conveyor.__all__` is the whole list of its module."""
    assert missing_names({"conveyor": "Queue Nothing"}) == ["conveyor.Nothing"]

    assert missing_names(NAMES) == []
    assert sorted(conveyor.__all__) == NAMES["conveyor"].split()
    assert set(NAMES["conveyor"].split()) <= set(dir(conveyor))


def test_pages_and_examples_import_public_names_alone() -> None:
    """Every name that the documentation and the examples import is public."""
    assert foreign_imports("from conveyor.payload.blobs import FileStore\nimport conveyor.store\n") == [
        "conveyor.payload.blobs: FileStore",
        "conveyor.store: ",
    ]

    texts = {str(path): "".join(block.text for block in blocks(path) if block.kind == "python") for path in PAGES}
    texts |= {str(path): path.read_text("utf-8") for path in (ROOT / "examples").rglob("*.py")}
    found = {name: foreign_imports(text) for name, text in texts.items()}
    assert {name: imports for name, imports in found.items() if imports} == {}


def test_events_are_documented() -> None:
    """The page of events names each class of an event that a listener gets, and no other."""
    documented = set(re.findall(r"^\| (?:`[\w-]+` \| )?`([A-Z]\w+)` \|", EVENTS, re.MULTILINE))

    assert documented == set(NAMES["conveyor.events"].split()) - {"Event", "JobEvent", "JobUpdate"}


# -- members ------------------------------------------------------------------------------------------------------


def section(title: str) -> str:
    """Return a section of the reference."""
    return REFERENCE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def paragraph(begin: str) -> str:
    """Return the paragraph of the reference that begins so."""
    [found] = [one for one in REFERENCE.split("\n\n") if one.startswith(begin)]
    return found


def table(begin: str) -> str:
    """Return the first cells of the table that follows the paragraph that begins so."""
    rows = REFERENCE.partition(begin)[2].partition("\n\n")[2].partition("\n\n")[0].splitlines()
    return "\n".join(row.split(" | ")[0] for row in rows if not row.startswith("| ---"))


def members(text: str) -> set[str]:
    """Return what is named in code: ``name(…)`` and words alone."""
    names: set[str] = set()
    for code in re.findall(r"`([^`]+)`", text):
        call = re.match(r"(?:async )?(\w+)\(", code)
        if call:
            names.add(call[1])
        elif re.fullmatch(r"[a-z_]+( [a-z_]+)*", code) and " as " not in code and code != "with":
            names.update(code.split())
    return names


def differences(visible: Iterable[str], documented: set[str]) -> list[str]:
    """Return the members that only one of the two knows; a twin is documented by the page's first sentence."""
    shown = {name for name in visible if not name.startswith("_")}
    known = documented | {f"a{name}" for name in documented}
    return [f"{name} is not documented" for name in sorted(shown - known)] + [
        f"{name} does not exist" for name in sorted(documented - shown)
    ]


def _of_app() -> set[str]:
    return set(re.findall(r"`@?app\.(\w+)", section("App"))) | {"aclose"}


APP = Conveyor("redis://127.0.0.1:1/0", namespace="public")


@APP.task
def add(a: int, b: int) -> int:
    """Add."""
    return a + b


CONTEXT = Context(job_id="q:1", task="t", queue="q", attempt=1, headers={}, state={}, deadline_hook=None)
QUEUE = members(table("`Queue[T]`:")) - {"len"}
OBJECTS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "app": (lambda: APP, _of_app()),
    "task": (lambda: add, members(paragraph("`Task[P, R]`:"))),
    "bound task": (lambda: add.options(priority=1), {"enqueue", "s"}),
    "job": (lambda: add.job("default:1"), members(paragraph("`Job[R]`:"))),
    "context": (lambda: CONTEXT, members(paragraph("`Context`:"))),
    "outgoing": (lambda: Outgoing("t", "q"), members(paragraph("`Outgoing`:"))),
    "queue": (lambda: APP.queue("one"), QUEUE),
    "partitioned queue": (lambda: APP.queue("many", partitions=3), QUEUE),
    "plain list": (lambda: APP.plain_list("list"), QUEUE),
    "message": (lambda: Message, members(paragraph("`Message[T]`:").partition("\n")[0])),
    "outbox": (lambda: Outbox(APP), members(table("`Outbox(app"))),
    "ledger": (Ledger, members(paragraph("`Ledger(table").partition(": ")[2])),
}


def test_a_stray_member_is_found() -> None:
    """A member that the page lacks is found, and so is one that only the page has."""

    class Stray:
        """A class with more than its page says."""

        def push(self) -> None: ...
        def apush(self) -> None: ...
        def pusher(self) -> None: ...

    page = members("`push(value, *, id)`, `pull(n=1)` and `name queue`")
    assert page == {"push", "pull", "name", "queue"}
    assert differences(dir(Stray()), page) == [
        "pusher is not documented",
        "name does not exist",
        "pull does not exist",
        "queue does not exist",
    ]


@pytest.mark.parametrize("name", OBJECTS)
def test_members_are_those_of_the_reference(name: str) -> None:
    """Completion shows of an object the members that the reference documents, and no others."""
    make, documented = OBJECTS[name]

    assert len(documented) > 1
    assert differences(dir(make()), documented) == []


def test_a_batch_is_a_list_with_the_documented_members() -> None:
    """A batch of messages has the members of a list and those of the reference."""
    documented = members(paragraph("`Message[T]`:").partition("\nA batch ")[2])

    assert differences(set(dir(Batch)) - set(dir(list)), documented) == []


# -- twins --------------------------------------------------------------------------------------------------------


def twins(owner: Any) -> list[tuple[str, Any, Any]]:
    """Return the pairs of a blocking call and its awaitable form that a class or a module offers."""
    public = [name for name in dir(owner) if not name.startswith("_")]
    return [
        (name, getattr(owner, name), getattr(owner, f"a{name}"))
        for name in public
        if f"a{name}" in public and callable(getattr(owner, name))
    ]


def shape(function: Any) -> tuple[list[tuple[Any, ...]], str]:
    """Return the parameters and the result of a function, without the difference that awaiting makes."""
    signature = inspect.signature(function)
    parameters = [
        (one.name, one.kind, one.default, re.sub(r"Awaitable\[(\w+)\]", r"\1", str(one.annotation)))
        for one in signature.parameters.values()
    ]
    result = re.sub(r"AsyncGenerator\[(.*), None\]", r"Generator[\1, None, None]", str(signature.return_annotation))
    return parameters, result.replace("AsyncIterator", "Iterator")


def unlike_twins(owner: Any) -> list[str]:
    """Return the names of the pairs whose parameters or results differ."""
    return [name for name, blocking, awaitable in twins(owner) if shape(blocking) != shape(awaitable)]


def _owners() -> list[Any]:
    public = [
        getattr(importlib.import_module(module), name) for module, names in NAMES.items() for name in names.split()
    ]
    made = [type(make()) for make, _ in OBJECTS.values() if not inspect.isclass(make())]
    classes = {one for one in (*public, *made, type(add.s(1, 2)), Batch) if inspect.isclass(one)}
    return [*sorted(classes, key=lambda one: one.__qualname__), *(importlib.import_module(module) for module in NAMES)]


def test_a_difference_between_twins_is_found() -> None:
    """Another default, name, kind or annotation of a parameter is found, and another result; awaiting is none."""

    class Pairs:
        """Pairs that differ in one thing each, and two that do not differ."""

        def a(self, n: int = 1) -> int: ...  # type: ignore[empty-body]
        async def aa(self, n: int = 2) -> int: ...  # type: ignore[empty-body]
        def b(self, n: int) -> int: ...  # type: ignore[empty-body]
        async def ab(self, m: int) -> int: ...  # type: ignore[empty-body]
        def c(self, n: int) -> int: ...  # type: ignore[empty-body]
        async def ac(self, *, n: int) -> int: ...  # type: ignore[empty-body]
        def d(self, n: int) -> int: ...  # type: ignore[empty-body]
        async def ad(self, n: str) -> int: ...  # type: ignore[empty-body]
        def e(self, n: int) -> int: ...  # type: ignore[empty-body]
        async def ae(self, n: int) -> str: ...  # type: ignore[empty-body]
        def f(self, function: Callable[P, R], n: int = 1) -> Iterator[int]: ...  # type: ignore[name-defined, empty-body]  # noqa: F821
        def af(self, function: Callable[P, Awaitable[R]], n: int = 1) -> AsyncIterator[int]: ...  # type: ignore[name-defined, empty-body]  # noqa: F821
        def g(self) -> Generator[int, None, None]: ...  # type: ignore[name-defined, empty-body]  # noqa: F821
        def ag(self) -> AsyncGenerator[int, None]: ...  # type: ignore[name-defined, empty-body]  # noqa: F821

    assert unlike_twins(Pairs) == ["a", "b", "c", "d", "e"]


def test_twins_take_the_same_parameters() -> None:
    """Each awaitable form takes what its blocking call takes, by the same names, and gives the same result."""
    owners = _owners()

    assert len([pair for owner in owners for pair in twins(owner)]) >= 50
    assert {owner.__name__: names for owner in owners if (names := unlike_twins(owner))} == {}
