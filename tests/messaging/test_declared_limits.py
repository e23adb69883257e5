"""Declared limits: their names and texts, the keys of jobs and messages, and what is refused at import or at the call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import pytest

from conveyor.errors import ConfigurationError, PayloadError
from conveyor.jobs.app import Conveyor
from conveyor.jobs.task import TaskDefinition, definition_of
from conveyor.messaging.declared_limits import declare_limits, held_limit, read_limit
from conveyor.messaging.limits import Concurrency, Rate
from conveyor.messaging.push_options import Outgoing
from conveyor.store.operations import Entry


@dataclass
class Order:
    customer: str
    total: int


class Mail(TypedDict):
    domain: str


def entry(task: Any, *args: Any, **kwargs: Any) -> Entry:
    definition: TaskDefinition = definition_of(task)
    return definition.prepare(definition.outgoing, args, kwargs)[1]


def message(queue: Any, body: Any, **options: Any) -> Entry:
    """Return the entry that a push would store."""
    value, own = body, queue._prepared(options)
    if queue._publisher.load_keys is not None:
        value, own = queue._publisher._passed(body, own)
    return own.entry("id", own.head + queue.codec.encode(value))


def test_a_job_has_its_limits_with_keys_and_costs(app: Conveyor) -> None:
    """The entry of a job names each limit with the cost and the key that its arguments give, and the key of its group."""

    @app.task(
        name="send", queue="mail", group_by="order.customer",
        limits=[Rate(100, "1s"), Rate(1000, "1m", by="order.customer", cost="order.total"), Concurrency(2, by="region", name="api")],
    )  # fmt: skip
    def send(order: Order, region: str = "eu") -> None: ...

    app.queue("mail", limits=[Concurrency(50)])
    one = entry(send, Order("acme", 7))

    assert one.group == "acme"
    assert one.limits == ("1:send.rate", "7:send.rate.order.customer:acme", "1:api:eu", "1:concurrency")


def test_a_message_has_its_limits(app: Conveyor) -> None:
    """`by` is a field of the body, a header, or the group; a message without that header or group does not count."""
    limits = [
        Rate(5, "1s"),
        Rate(9, "1s", by="customer"),
        Concurrency(1, by="headers.tenant"),
        Concurrency(2, by="group"),
    ]
    orders = app.queue("orders", Order, limits=limits)

    assert message(orders, Order("c7", 1), headers={"tenant": "acme"}, group="g").limits == (
        "1:rate", "1:rate.customer:c7", "1:concurrency.headers.tenant:acme", "1:concurrency.group:g",
    )  # fmt: skip
    assert message(orders, Order("c7", 1)).limits == ("1:rate", "1:rate.customer:c7")
    assert message(app.queue("plain", limits=[Rate(5, "1s")]), 1).limits == ("1:rate",)


def test_a_key_that_is_none_does_not_count(app: Conveyor) -> None:
    """A job whose key is None has no group and is not counted by the limit of that key; nor does one that costs nothing."""

    @app.task(group_by="tenant", limits=[Concurrency(1, by="tenant"), Rate(10, "1s", cost="tokens")])
    def ask(tenant: str | None = None, tokens: int = 1) -> None: ...

    assert (entry(ask).group, entry(ask).limits) == (None, (f"1:{definition_of(ask).name}.rate",))
    assert entry(ask, "a", tokens=0).limits == (f"1:{definition_of(ask).name}.concurrency.tenant:a",)


def test_options_and_middlewares_give_the_group(app: Conveyor) -> None:
    """`options(group=…)` wins over `group_by`, and a middleware over both; limits by the group follow."""

    @app.task(group_by="tenant", limits=[Concurrency(2, by="group", name="each")])
    def ask(tenant: str) -> None: ...

    bound = ask.options(group="special")
    assert entry_of_call(bound, "a").limits == ("1:each:special",)

    class Regroup:
        def push(self, outgoing: Outgoing) -> None:
            outgoing.group = "from the middleware"

    app.middleware(Regroup)
    assert entry(ask, "a").group == "from the middleware"
    assert message(app.queue("q"), 1).group is None
    assert message_through(app, "q").group == "from the middleware"


def entry_of_call(bound: Any, *args: Any) -> Entry:
    call = bound.s(*args)
    definition: TaskDefinition = call.definition
    return definition.prepare(call.outgoing, call.args, call.kwargs)[1]


def message_through(app: Conveyor, name: str) -> Entry:
    queue = app.queue(name)
    value, own = queue._publisher._passed(1, queue._prepared({}))
    return own.entry("id", own.head + queue.codec.encode(value))


def test_names_of_limits() -> None:
    """A limit is called by its owner, kind and `by`; a second one alike gets a number; its own name stands for itself."""
    limits = [Rate(1, "1s"), Rate(9, "1m"), Concurrency(2, by="a.b"), Rate(1, "1s", name="api")]
    assert [one.name for one in declare_limits("task t:x", limits, prefix="t:x")] == [
        "t.x.rate", "t.x.rate-2", "t.x.concurrency.a.b", "api",
    ]  # fmt: skip


def test_text_of_a_limit_is_read_as_it_was() -> None:
    """The limit in the settings of a queue holds again, also of one partition, and of an operator's change."""
    limits = [
        Rate(100, "90s", by="a", cost="t"),
        Rate(7, "1m", smooth=True),
        Concurrency(8),
        Rate(10**9, "1s", cost="t"),
    ]
    for one in declare_limits("queue q", limits):
        assert read_limit(one.text()) == one.limit
    [shared, exact] = declare_limits("queue q", [Concurrency(8, by="a"), Concurrency(8, by="group")])
    assert (shared.text(4), exact.text(4)) == ("c 2 a", "c 8 +group")
    assert read_limit("r 5 60000 0", "r 9 60000 0 a/t") == Rate(5, "1m", by="a", cost="t")


def test_the_limit_that_a_service_holds() -> None:
    """RateLimited holds the first rate of a job, for its key, else its first limit, else its group; else it has none."""
    declared = {one.name: one for one in declare_limits("task t", [Concurrency(1), Rate(1, "1s", by="a")])}
    assert held_limit(["1:concurrency", "1:rate.a:x:y"], "g", declared) == "rate.a:x:y"
    assert held_limit(["1:concurrency"], "g", declared) == "concurrency"
    assert held_limit([], "g", declared) == ":g"
    assert held_limit([], None, declared) is None


REFUSED_TASKS: list[tuple[dict[str, Any], str]] = [
    ({"limits": [Rate(1, "1s", by="tennant")]}, "Did you mean 'tenant'"),
    ({"limits": [Rate(1, "1s", cost="size")]}, r"Rate\(cost\) names 'size', which is no argument"),
    ({"limits": [Concurrency(1, by="headers")]}, "'headers', which is no argument"),
    ({"group_by": "x"}, "group_by names 'x'"),
    ({"group_by": 5}, "group_by must name an argument"),
    ({"limits": Rate(1, "1s")}, r"must be a list: limits=\[Rate\(1, '1s'\)\]"),
    ({"limits": [5]}, "takes Rate"),
    ({"limits": [Rate(1, "1s", name="a"), Rate(2, "1s", name="a")]}, "are called 'a'"),
    ({"limits": [Concurrency(3, by="tenant")], "queue": "parted"}, "smaller than the 4 partitions"),
    ({"limits": [Rate(1, "1s", name="api")], "queue": "shared"}, "declared twice, differently"),
    ({"limits": [Rate(1, "1s")], "name": "a.b", "queue": "named"}, "Give each a name"),
    ({"limits": [Rate(1, "1s")], "queue": "listed"}, "plain list 'listed'"),
    ({"group_by": "tenant", "name": "fed"}, "plain list"),
    ({"queue": "strict"}, "names 'customer', which is no argument"),
    (
        {"limits": [Rate(9, "1s"), Concurrency(1)], "ack": "early"},
        r"Concurrency\(1\) of task send counts jobs that run",
    ),
    ({"queue": "narrow", "ack": "early"}, r"Concurrency\(1\) of queue narrow counts jobs that run"),
]


@pytest.mark.parametrize(("options", "why"), REFUSED_TASKS)
def test_what_a_task_cannot_have_is_refused_at_import(app: Conveyor, options: dict[str, Any], why: str) -> None:
    """A limit or a group that no job could have is refused where it is declared, and the task is not registered."""
    app.queue("parted", partitions=4)
    app.task(name="other", queue="shared", limits=[Rate(9, "1s", name="api")])(lambda tenant: None)
    app.task(name="a:b", queue="named", limits=[Rate(1, "1s")])(lambda tenant: None)
    app.plain_list("listed")
    app.plain_list("feeds", task="fed")
    app.queue("strict", limits=[Rate(1, "1s", by="customer")])
    app.queue("narrow", limits=[Concurrency(1)])
    before = set(app.tasks)

    def send(tenant: str) -> None: ...

    with pytest.raises(ConfigurationError, match=why):
        app.task(**{"name": "send", **options})(send)
    assert set(app.tasks) == before


def test_a_queue_is_checked_with_its_tasks(app: Conveyor) -> None:
    """A queue that is declared after its tasks is checked with them: keys, and parts of their limits."""

    @app.task(name="send", queue="mail", limits=[Concurrency(2)])
    def send(tenant: str) -> None: ...

    with pytest.raises(ConfigurationError, match="names 'customer', which is no argument of send"):
        app.queue("mail", limits=[Rate(1, "1s", by="customer")])
    with pytest.raises(ConfigurationError, match=r"Concurrency\(2\) of task send is smaller than the 4 partitions"):
        app.queue("mail", partitions=4)
    app.task(name="early", queue="early", ack="early")(lambda: None)
    with pytest.raises(ConfigurationError, match="those of task 'early', which has ack='early'"):
        app.queue("early", limits=[Concurrency(1)])
    app.queue("mail", partitions=2, limits=[Rate(2, "1s", by="tenant")])
    assert entry(send, "a").limits == ("1:send.concurrency", "1:rate.tenant:a")


REFUSED_QUEUES: list[tuple[Any, dict[str, Any], str]] = [
    (Order, {"limits": [Rate(1, "1s", by="custmer")]}, "no field of Order. Did you mean 'customer'"),
    (Mail, {"limits": [Rate(1, "1s", cost="size")]}, "'size', which is no field of Mail"),
    (int, {"limits": [Rate(1, "1s", by="customer")]}, "no field of int"),
    (Any, {"limits": [Concurrency(3)], "partitions": 4}, "smaller than the 4 partitions"),
    (Any, {"limits": 7}, "must be a list"),
]


@pytest.mark.parametrize(("type_", "options", "why"), REFUSED_QUEUES)
def test_what_a_queue_cannot_have_is_refused(app: Conveyor, type_: Any, options: dict[str, Any], why: str) -> None:
    """A limit of a queue whose key is no field, or whose parts would be empty, is refused where it is declared."""
    with pytest.raises(ConfigurationError, match=why):
        app.queue("orders", type_, **options)


@pytest.mark.parametrize("tokens", [-1, "9", float("nan"), True, None, 11])
def test_an_impossible_cost_is_refused_at_the_call(app: Conveyor, tokens: Any) -> None:
    """A cost that is no number of at least 0, or above the limit, is refused at the call, and nothing is stored."""

    @app.task(name="ask", queue="llm", limits=[Rate(10, "1s", cost="tokens")])
    def ask(tokens: Any) -> None: ...

    with pytest.raises(PayloadError, match=r"Nothing was (stored|enqueued)"):
        ask.enqueue(tokens)
    assert not app.client.queues()


def test_a_cost_above_the_part_of_a_partition_is_refused(app: Conveyor) -> None:
    """In partitions a job may cost what one partition has."""
    app.queue("llm", partitions=4)
    task = app.task(name="ask", queue="llm", limits=[Rate(100, "1s", cost="tokens")])(lambda tokens: None)
    assert entry(task, 25).limits == ("25:ask.rate",)
    with pytest.raises(PayloadError, match="of which each partition has 25"):
        entry(task, 26)


@pytest.mark.parametrize("group", ["", 7, "a\nb", "g" * 10_240, "\ud800"])
def test_an_impossible_group_is_refused(app: Conveyor, group: Any) -> None:
    """A group key that is no text, not printable or above 1 KB is refused at the call, and nothing is stored."""
    task = app.task(name="t")(lambda: None)
    with pytest.raises(ConfigurationError, match="group"):
        app.queue("orders").push(1, group=group)
    with pytest.raises(ConfigurationError, match="group"):
        task.options(group=group)
    assert not app.client.queues()


def test_plain_lists_refuse_groups(app: Conveyor) -> None:
    """A push to a plain list takes no group, and a list may not feed a task that needs keys."""
    with pytest.raises(ConfigurationError, match="takes no"):
        app.plain_list("raw").push({"id": 1}, group="c7")
    app.task(name="limited", limits=[Rate(1, "1s")])(lambda: None)
    with pytest.raises(ConfigurationError, match="carry no keys"):
        app.plain_list("feeds", task="limited")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "needs weight="), ({"weight": -1}, "from 1 to"), ({"weight": 0}, "paused=True"), ({"weight": 1.5}, "whole"),
        ({"paused": 1}, "True or False"), ({"weight": 10**6}, "from 1 to"),
    ],
)  # fmt: skip
def test_an_impossible_weight_is_refused(app: Conveyor, options: dict[str, Any], why: str) -> None:
    """A weight that is no whole number of at least 1 is refused, and nothing is changed."""
    with pytest.raises(ConfigurationError, match=why):
        app.groups.set("orders", "acme", **options)
