"""Topics on a single server: a publish is one step, and every queue that subscribes at that moment gets its copy, once."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import redis as redis_py
from redis.exceptions import ConnectionError as TransportError

from conveyor import Concurrency, Conveyor, Outgoing, QueueFull, StoreUnavailable
from conveyor.errors import ConfigurationError, ConveyorError, PayloadError
from conveyor.jobs.core import core_of
from conveyor.messaging.topic import TopicInfo
from conveyor.store import inspection, topics
from conveyor.store.topics import TopicKeys
from support.cut_commands import Cut, Dies
from support.script_faults import break_script

TOPIC = "user.created"


def taken(app: Conveyor, queue: str) -> list[Any]:
    """Pull all messages of a queue that are ready, and return their bodies."""
    bodies = []
    while messages := app.queue(queue).pull(100):
        for message in messages:
            assert message.topic
            bodies.append(message.body)
            message.ack()
    return bodies


@pytest.fixture
def other(url: str) -> Iterator[Conveyor]:
    """A second program on the same server."""
    with Conveyor(url) as app:
        yield app


def test_each_subscriber_gets_a_message_of_its_own(app: Conveyor, redis: redis_py.Redis) -> None:
    """A copy is an ordinary message of its queue: it is acked, retried and dead-lettered there, and the others do not notice."""
    topic = app.topic(TOPIC)
    assert topic.subscribe("emails", app.queue("audit")) == 2
    assert topic.subscribe("emails") == 0
    assert topic.subscribers() == ["audit", "emails"]

    ids = topic.publish({"id": 7}, headers={"trace": "t1"}, priority=3)
    assert [id_.partition(":")[0] for id_ in ids] == ["audit", "emails"]
    assert len({id_.partition(":")[2] for id_ in ids}) == 1
    [email] = app.queue("emails").pull()
    assert (email.body, email.topic, email.headers, email.priority) == ({"id": 7}, TOPIC, {"trace": "t1"}, 3)
    email.dead("no address")
    [entry] = app.queue("audit").pull()
    assert (entry.id, entry.attempt) == (ids[0], 1)
    entry.ack()
    assert [letter.id for letter in app.queue("emails").dead_letters()] == [ids[1]]
    assert app.queue("emails").purge(dead=True) == 1

    app.queue("emails").push("by hand")
    [plain] = app.queue("emails").pull()
    assert plain.topic == ""
    plain.ack()
    for queue in ("emails", "audit"):
        assert app.client.run(inspection.audit(app.client.keys(queue))) == []


def test_options_hold_for_every_copy(app: Conveyor) -> None:
    """A delay, an own id and a unique key mean in each queue what they mean there; a second publish of an id stores nothing."""
    topic = app.topic(TOPIC)
    topic.subscribe("a", "b")
    topic.publish("later", delay="1h")
    assert [app.queue(queue).stats().scheduled for queue in ("a", "b")] == [1, 1]
    assert topic.publish("first", id="u-1") == ["u-1", "u-1"]
    topic.subscribe("c")
    assert topic.publish("again", id="u-1") == ["u-1", "u-1", "u-1"]
    assert [taken(app, queue) for queue in ("a", "b", "c")] == [["first"], ["first"], ["again"]]
    one, two = (topic.publish(number, unique="key") for number in (1, 2))
    assert one == two
    assert [taken(app, queue) for queue in ("a", "b", "c")] == [[1], [1], [1]]
    topic.publish("back", tags=["order:1"])
    assert {one.queue for one in app.jobs(tag="order:1")} == {"a", "b", "c"}
    topic.publish("front", front=True)
    assert taken(app, "a") == ["front", "back"]
    for queue in ("a", "b", "c"):
        app.queue(queue).purge()


def test_subscriptions_count_from_the_next_publish_on(app: Conveyor, other: Conveyor) -> None:
    """A program that has published before sees what another has subscribed and unsubscribed since, in its next publish."""
    topic = app.topic(TOPIC)
    other.topic(TOPIC).subscribe("old")
    assert len(topic.publish(1)) == 1
    other.topic(TOPIC).subscribe("new")
    other.topic("user.*").subscribe("all")
    assert len(topic.publish(2)) == 3
    other.topic(TOPIC).unsubscribe("old")
    assert len(topic.publish(3)) == 2
    other.topic("user.*").unsubscribe("all")
    other.topic(TOPIC).unsubscribe("new")
    assert topic.publish(4) == []
    assert [taken(app, queue) for queue in ("old", "new", "all")] == [[1, 2], [2, 3], [2, 3]]


MATCHES = {
    "user.created": ["user.created", "user.*", "*.created", "*.*", "user.#", "#", "*.#", "user.created.#", "*.*.#"],
    "user": ["user", "*", "#", "user.#", "*.#"],
    "user.created.eu": ["user.#", "#", "*.#", "user.*.eu", "*.created.*", "user.created.*", "user.created.#", "*.*.#"],
    "order.created": ["*.created", "*.*", "#", "*.#", "*.*.#"],
    "User.created": ["*.created", "*.*", "#", "*.#", "*.*.#"],
}


def test_patterns(app: Conveyor, redis: redis_py.Redis) -> None:
    """`*` is one word, `#` any number at the end, also none; a queue that several names reach gets one copy."""
    patterns = sorted({pattern for found in MATCHES.values() for pattern in found} | {"user.created.*.x", "*.*.*.*"})
    names = {pattern: f"q{at}" for at, pattern in enumerate(patterns)}
    for pattern, queue in names.items():
        app.topic(pattern).subscribe(queue, "all")
    for topic, expected in MATCHES.items():
        assert app.topic(topic).subscribers() == sorted({"all", *(names[pattern] for pattern in expected)}), topic
    assert len(app.topic("user").publish(1)) == 1 + len(MATCHES["user"])
    for queue in ("all", *(names[pattern] for pattern in MATCHES["user"])):
        assert taken(app, queue) == [1]
    assert app.topic("user.*").subscribers() == sorted(["all", names["user.*"]])


def test_matching_costs_the_same_beside_thousands_of_patterns(app: Conveyor, redis: redis_py.Redis) -> None:
    """5,000 other subscriptions of the same shape add no command to a look-up: it is two, whatever is subscribed."""
    registry = TopicKeys("conveyor").registry
    app.topic("*.created").subscribe("q")
    fields = {f"=t{n}.*": "x" for n in range(2500)} | {f"=t{n}.created": "x" for n in range(2500)}
    redis.hset(registry, mapping=fields)
    app.topic("a.*").subscribe("y")  # the shapes are found again
    assert app.topic("b.created").subscribers() == ["q"]  # the server knows the script now
    redis.config_resetstat()
    assert app.topic("a.created").subscribers() == ["q", "y"]
    stats = redis.info("commandstats")
    assert {name: row["calls"] for name, row in stats.items() if name != "cmdstat_config|resetstat"} == {
        "cmdstat_evalsha": 1, "cmdstat_hmget": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["", ".", "a.", ".a", "a..b", "a b", "a/b", "#.a", "a.#.b", "user.*x", "a.##", "a.b\n", "é.b", "a" * 129, 7, None],
)
def test_bad_names(app: Conveyor, redis: redis_py.Redis, name: Any) -> None:
    """A name that is no sequence of words is refused when it is written, and so is a wildcard that is no word."""
    with pytest.raises(ConfigurationError, match="words") as refused:
        app.topic(name)
    assert refused.value.code == "E02"


def test_what_cannot_subscribe_or_be_published(app: Conveyor, redis: redis_py.Redis) -> None:
    """A queue of jobs, a task, a plain list, a queue of another app, and a publish to a pattern: refused, nothing is stored."""

    @app.task(queue="jobs")
    def work() -> None: ...

    app.plain_list("list")
    topic = app.topic(TOPIC)
    with Conveyor("redis://nowhere") as elsewhere:
        for queues, words in (
            (("ok", "jobs"), "holds jobs"),
            ((work,), "enqueue the task from its consumer"),
            (("ok", "list"), "bare documents"),
            ((elsewhere.queue("far"),), "same app"),
            (("ok", "a b"), "Invalid queue name"),
            (("ok/3",), "Invalid queue name"),
            ((), "Name the queues"),
        ):
            with pytest.raises(ConfigurationError, match=words):
                topic.subscribe(*queues)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="is a pattern"):
        app.topic("user.*").publish(1)
    with pytest.raises(TypeError, match="timeout"):
        topic.publish(1, timeout=1)  # type: ignore[call-arg]
    for options in ({"priority": 10}, {"delay": -1}, {"id": ""}, {"expires": 0}, {"delay": 1, "front": True}):
        with pytest.raises(ConfigurationError):
            topic.publish(1, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="publish_many takes no id"):
        topic.publish_many([1], id="x")  # type: ignore[call-arg]
    with pytest.raises(PayloadError):
        topic.publish(object())
    with pytest.raises(ConfigurationError, match="version"):
        app.topic(TOPIC, version=0)
    assert redis.keys("*") == []


@dataclass
class User:
    """A payload with a type."""

    id: int


@pytest.mark.leaves_keys("messages are leased at its end")
def test_groups_and_limits_of_a_subscriber(url: str, other: Conveyor) -> None:
    """A group keeps its order in each queue, and a queue that has limits has them for copies too, by fields of the message."""
    with Conveyor(url) as app:
        narrow = app.queue("narrow", limits=[Concurrency(1, by="customer")])
        single = app.queue("single", limits=[Concurrency(1)])
        app.topic(TOPIC).subscribe("free", narrow, single)
        app.topic(TOPIC).publish_many([{"customer": "a"}, {"customer": "a"}, {"customer": "b"}])
        app.topic(TOPIC).publish({"customer": "g", "n": 1}, group="g")
        app.topic(TOPIC).publish({"customer": "g", "n": 2}, group="g")
        found = {
            queue.name: [m.body["customer"] for m in queue.pull(9)] for queue in (narrow, single, other.queue("free"))
        }
        assert {name: sorted(bodies) for name, bodies in found.items()} == {
            "narrow": ["a", "b", "g"], "single": ["a"], "free": ["a", "a", "b", "g"],
        }  # fmt: skip


def test_typed_payload(app: Conveyor) -> None:
    """A topic with a type refuses other values, and a queue of that type reads what was published."""
    topic = app.topic(TOPIC, User)
    topic.subscribe("users")
    topic.publish(User(7))
    with pytest.raises(PayloadError, match=r"topic 'user\.created'"):
        topic.publish({"id": "x"})  # type: ignore[arg-type]
    with pytest.raises(PayloadError, match="Message 1"):
        topic.publish_many([User(8), "x"])  # type: ignore[list-item]
    [message] = app.queue("users", User).pull(5)
    assert message.body == User(7)
    message.ack()


@pytest.mark.row("D281")
def test_a_full_subscriber_refuses_the_whole_publish(app: Conveyor, other: Conveyor) -> None:
    """While one queue has no room, no queue gets a copy; with room each gets it once. Nothing is dropped behind one's back."""
    topic = app.topic(TOPIC)
    app.queue("small", max_length=2)
    topic.subscribe("big", "small")
    topic.publish_many([1, 2])
    for publish in (topic.publish, other.topic(TOPIC).publish, lambda value: topic.publish_many([value])):
        with pytest.raises(QueueFull, match="'small' holds 2 jobs and takes at most 2"):
            publish(3)
    assert app.topics() == [TopicInfo(TOPIC, ("big", "small"), 2, 0)]
    assert taken(other, "small") == [1, 2]
    topic.publish(4)
    assert [taken(other, queue) for queue in ("big", "small")] == [[1, 2, 4], [4]]


def test_a_subscriber_whose_producers_wait_for_room_refuses_at_once(app: Conveyor, other: Conveyor) -> None:
    """A publish waits for no queue: one that blocks its producers when full refuses the publish, whole, as one that raises."""
    small = app.queue("small", max_length=1, full="block")
    app.topic(TOPIC).subscribe("big", small)
    app.topic(TOPIC).publish(1)
    for program in (app, other):
        with pytest.raises(QueueFull, match="'small' holds 1 jobs and takes at most 1"):
            program.topic(TOPIC).publish(2)
    assert [taken(other, queue) for queue in ("big", "small")] == [[1], [1]]
    assert small.stats().blocked == 0


def test_counts(app: Conveyor, redis: redis_py.Redis) -> None:
    """Messages published are counted by topic, and those that reached nobody besides; by name for 10,000 topics, then together."""
    app.topic(TOPIC).publish_many(range(5))
    app.topic(TOPIC).subscribe("q")
    app.topic("user.#").subscribe("q")
    app.topic(TOPIC).publish(6)
    assert app.topics() == [TopicInfo("user.#", ("q",)), TopicInfo(TOPIC, ("q",), 6, 5)]
    redis.hset(TopicKeys("conveyor").counts, mapping={f"{sign}t{n}": 1 for n in range(10_000) for sign in "+-"})
    for number in (1, 2):
        app.topic("one.too.many").publish(number)
        app.topic("another.one").publish_many([number, number])
    found = {info.name: info for info in app.topics()}
    assert len(found) == 10_000 + 3
    assert (found[""].published, found[""].nobody, found[TOPIC].published) == (6, 6, 6)
    assert taken(app, "q") == [6]


def test_middlewares_see_a_publish_once(url: str) -> None:
    """A middleware is called once a message, with the topic and no queue, and what it changes is in every copy."""
    seen: list[tuple[str, str]] = []
    with Conveyor(url) as app:

        @app.middleware
        class Tracing:
            def push(self, outgoing: Outgoing) -> None:
                seen.append((outgoing.topic, outgoing.queue))
                outgoing.headers["trace"] = "t"
                outgoing.body += 1

        app.topic(TOPIC).subscribe("a", "b")
        app.topic(TOPIC).publish_many([1, 2])
        assert seen == [(TOPIC, ""), (TOPIC, "")]
        for queue in ("a", "b"):
            messages = app.queue(queue).pull(5)
            assert [(m.body, m.headers, m.topic) for m in messages] == [
                (2, {"trace": "t"}, TOPIC),
                (3, {"trace": "t"}, TOPIC),
            ]
            for message in messages:
                message.ack()


def test_sealed_copies_belong_to_their_queue(url: str, redis: redis_py.Redis) -> None:
    """With keys each copy has the seal of its queue: one that is moved to another queue does not open there."""
    with Conveyor(url, keys={"k": "s" * 32}, encrypt=True) as app:
        topic = app.topic(TOPIC)
        topic.subscribe("a", "b")
        topic.publish({"secret": 1})
        app.topic(TOPIC).subscribe("c")
        topic.publish({"secret": 2})
        stored = [redis.hvals(app.client.keys(queue).jobs) for queue in ("a", "b")]
        assert b"secret" not in b"".join(stored[0] + stored[1])
        assert not set(stored[0]) & set(stored[1])
        assert [taken(app, queue) for queue in ("a", "b", "c")] == [[{"secret": 1}, {"secret": 2}]] * 2 + [
            [{"secret": 2}]
        ]


def test_partitions_of_a_subscriber(url: str, other: Conveyor) -> None:
    """A queue with partitions gets each copy in one of them, also from a program that does not declare it."""
    with Conveyor(url) as app:
        wide: Any = app.queue("wide", partitions=3)
        app.topic(TOPIC).subscribe("wide", "narrow")
        for number in range(6):
            app.topic(TOPIC).publish(number)
        for number in range(6, 12):
            places = [id_.partition(":")[0].partition("/")[0] for id_ in other.topic(TOPIC).publish(number)]
            assert places == ["narrow", "wide"]
        assert [part.stats().ready for part in wide.parts] == [4, 4, 4]
        other.topic(TOPIC).publish("x", unique="k")
        assert other.topic(TOPIC).publish("x", unique="k") == app.topic(TOPIC).publish("y", unique="k")
        assert sorted(map(str, taken_of(wide))) == sorted([*map(str, range(12)), "x"])
        assert len(taken(app, "narrow")) == 13
        wide.repartition(2)
    [_, id_] = other.topic(TOPIC).publish("moved")
    assert id_.startswith("wide/")
    with Conveyor(url) as app:
        assert taken_of(app.queue("wide", partitions=2)) == ["moved"]
        assert taken(app, "narrow") == ["moved"]


def taken_of(queue: Any) -> list[Any]:
    """Pull all messages of a declared queue."""
    bodies = []
    while messages := queue.pull(100):
        for message in messages:
            bodies.append(message.body)
            message.ack()
    return bodies


def test_a_deleted_queue_leaves_its_topics(app: Conveyor, redis: redis_py.Redis) -> None:
    """The deletion of a queue ends its subscriptions: nothing begins it anew."""
    app.topic(TOPIC).subscribe("gone", "stays")
    app.topic("user.*").subscribe("gone")
    app.topic(TOPIC).publish(1)
    taken(app, "gone")
    app.queue("gone").delete()
    assert app.topic(TOPIC).publish(2)[0].startswith("stays:")
    assert app.topic("user.*").subscribers() == []
    assert taken(app, "stays") == [1, 2]
    assert app.client.queues() == ["stays"]
    app.queue("stays").delete()
    assert redis.exists(TopicKeys("conveyor").registry) == 0


async def test_awaitable_forms(url: str) -> None:
    """The twins do the same; publishes at the same time do not disturb each other, and each arrives once."""
    async with Conveyor(url) as app:
        topic = app.topic(TOPIC)
        assert await topic.asubscribe("a", "b") == 2
        ids = await asyncio.gather(*(topic.apublish(number) for number in range(200)))
        assert len({id_ for copies in ids for id_ in copies}) == 400
        assert len(await topic.apublish_many(range(200, 2500))) == 2300
        assert await topic.asubscribers() == ["a", "b"]
        for queue in ("a", "b"):
            bodies = []
            while messages := await app.queue(queue).apull(1000):
                for message in messages:
                    bodies.append(message.body)
                    await message.aack()
            assert sorted(bodies[:200]) == list(range(200))
            assert bodies[200:] == list(range(200, 2500))
        assert await topic.aunsubscribe("a", "b") == 2
        assert await topic.apublish(1) == []
        assert await app.atopics() == [TopicInfo(TOPIC, (), 2501, 1)]


@pytest.mark.parametrize("queues", [1, 2, 10])
def test_cost_of_a_publish(app: Conveyor, redis: redis_py.Redis, queues: int) -> None:
    """A publish to k queues is one round trip: 4 commands in its script, and 8 for each queue."""
    topic = app.topic(TOPIC)
    topic.subscribe(*(f"q{n}" for n in range(queues)))
    topic.publish(0)
    redis.config_resetstat()
    topic.publish(1)
    stats = {name.removeprefix("cmdstat_"): row["calls"] for name, row in redis.info("commandstats").items()}
    del stats["config|resetstat"]
    assert stats == {
        # the step itself: who published what, who subscribes, the count, the reply kept for a repeat
        "evalsha": 1, "get": 1, "hget": 1, "hincrby": 1,
        # of each queue: its settings, two reads, two rights that are proven, the record, the entry, the token
        "hmget": queues, "hlen": queues, "llen": queues, "hdel": queues, "hset": queues, "rpush": queues, "exists": queues,
        "set": queues + 1,
    }  # fmt: skip
    redis.config_resetstat()
    topic.publish_many(range(100))
    assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] == 1
    for n in range(queues):
        assert taken(app, f"q{n}") == [0, 1, *range(100)]


@pytest.mark.row("D281")
@pytest.mark.parametrize("sent", [False, True], ids=["not sent", "reply lost"])
def test_a_publish_whose_answer_is_lost_is_stored_once(
    app: Conveyor, other: Conveyor, monkeypatch: pytest.MonkeyPatch, sent: bool
) -> None:
    """
    The connection breaks at each command of a publish in turn, while the subscribers change: each queue gets one copy.

    Consumers take what has arrived before the repeat comes, so no id is left to recognise it by.
    """
    topic, steps, at = app.topic(TOPIC), 1, 0
    while at <= steps:
        topic.subscribe("a", "b")
        topic.publish("before")
        other.topic(TOPIC).subscribe("c")
        with monkeypatch.context() as patch:
            cut = Cut(patch, at, sent=sent, error=TransportError)
            topic.publish(at)
            steps = max(steps, cut.count)
        assert [taken(app, queue) for queue in ("a", "b", "c")] == [["before", at], ["before", at], [at]], at
        topic.unsubscribe("a", "b", "c")
        at += 1
    assert at > 2


@pytest.mark.row("D281")
@pytest.mark.parametrize("sent", [False, True], ids=["before it left", "behind it"])
def test_a_publisher_that_dies(app: Conveyor, other: Conveyor, monkeypatch: pytest.MonkeyPatch, sent: bool) -> None:
    """It dies at each command in turn: every subscriber has its copy, or none has."""
    app.topic(TOPIC).subscribe("a", "b", "c")
    with Conveyor(app.client.configured_url) as publisher:  # so that the server knows the scripts
        publisher.topic(TOPIC).publish("first")
    assert [taken(other, queue) for queue in ("a", "b", "c")] == [["first"]] * 3
    stored = set[bool]()
    with monkeypatch.context() as patch, Conveyor(app.client.configured_url) as publisher:
        steps = Cut(patch, 0, sent=sent, error=Dies)
        publisher.topic(TOPIC).publish("last")
    for queue in ("a", "b", "c"):
        assert taken(other, queue) == ["last"]
    assert 3 <= steps.count <= 4
    for at in range(1, steps.count + 1):
        publisher = Conveyor(app.client.configured_url)
        with monkeypatch.context() as patch:
            cut = Cut(patch, at, sent=sent, error=Dies)
            with suppress(Dies):
                publisher.topic(TOPIC).publish(at)
            assert cut.count >= min(at, 3)
        app.topic(TOPIC).publish("last")
        found = [taken(other, queue) for queue in ("a", "b", "c")]
        assert found[0] == found[1] == found[2]
        assert found[0] in ([at, "last"], ["last"])
        stored.add(len(found[0]) == 2)
        publisher.close()
    assert False in stored
    assert not sent or True in stored  # the publish itself may be the last command, and then never leaves


@pytest.mark.row("D281")
def test_a_full_server_takes_a_publish_whole_or_not(start_server: Callable[..., Any]) -> None:
    """With `noeviction` at its limit of memory the server refuses a publish: QueueFull, and no queue has a copy."""
    server = start_server("--maxmemory", "12mb", "--maxmemory-policy", "noeviction")
    with server.client() as client, Conveyor(server.url) as app:
        topic = app.topic(TOPIC)
        topic.subscribe("a", "b")
        topic.publish("x")
        refused = None
        while refused is None:
            try:
                topic.publish("y" * 100_000)
            except (QueueFull, StoreUnavailable) as error:
                refused = error
        lengths = {len(app.queue(queue)) for queue in ("a", "b")}
        assert len(lengths) == 1
        assert app.topics()[0].published == lengths.pop()
        assert topic.unsubscribe("a") == 1
        client.flushall()


@pytest.mark.row("D281")
def test_random_changes_against_a_model(app: Conveyor, other: Conveyor, rounds: Callable[[int, int], int]) -> None:
    """Two programs subscribe, unsubscribe, publish, delete and take at random: each queue holds what a simple model says."""
    compare_with_model(app, other, rounds(5000, 400), random.randrange(2**32))


# what is broken → the operation, the line of its script, what stands there instead
SABOTAGES = {
    "publish trusts what its program remembers": ("PUBLISH", "~= ARGV[3] then", "== 'x' then"),
    "publish leaves the last queue out": ("PUBLISH", "for queue = 1, number do reply", "for queue = 1, math.max(math.min(number, 1), number - 1) do reply"),
    "publish counts one message": ("PUBLISH", "count_published(KEYS[3], ARGV[2], ARGV[4]", "count_published(KEYS[3], ARGV[2], '2'"),
    "subscribe forgets who was there": ("SUBSCRIBE", "else kept[#kept + 1] = queue end", "end"),
    "subscribe keeps its version": ("SUBSCRIBE", "'version', version,", "'version', redis.call('HGET', registry, 'version') or version,"),
    "a wildcard is any number of words": ("SUBSCRIBERS", "rest and #pattern <= #words + 1", "#pattern <= #words + 1"),
    "leaving ends one subscription": ("SUBSCRIBE", "if how ~= 'add' and named[queue] then", "if how ~= 'add' and named[queue] and changed == 0 then"),
}  # fmt: skip


@pytest.mark.leaves_keys("the run ends amid its steps")
@pytest.mark.parametrize("name", SABOTAGES)
def test_sabotage_is_caught(app: Conveyor, other: Conveyor, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The comparison with the model fails when a script is broken in this way."""
    break_script(monkeypatch, topics, *SABOTAGES[name])
    with pytest.raises((AssertionError, ConveyorError, ValueError)) as caught:
        compare_with_model(app, other, 2000, 4711)
    assert "user_script" not in str(caught.value), "the sabotage does not even run"


def compare_with_model(app: Conveyor, other: Conveyor, steps: int, seed: int) -> None:
    """Make random steps by both programs, and compare what they answer and leave with a model."""
    rng = random.Random(seed)
    names = ["user", "user.created", "user.deleted", "user.created.eu", "order.created"]
    patterns = [*names, "user.*", "*.created", "#", "user.#", "*"]
    queues = ["q0", "q1", "q2", "q3"]
    subscriptions: dict[str, set[str]] = {pattern: set() for pattern in patterns}
    held: dict[str, list[int]] = {queue: [] for queue in queues}
    published, nobody = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for number in range(steps):
        program = rng.choice((app, other))
        pattern, queue, topic = rng.choice(patterns), rng.choice(queues), rng.choice(names)
        match rng.choice(["subscribe", "subscribe", "unsubscribe", "publish", "publish", "publish", "take", "delete"]):
            case "subscribe":
                assert program.topic(pattern).subscribe(queue) == (queue not in subscriptions[pattern])
                subscriptions[pattern].add(queue)
            case "unsubscribe":
                assert program.topic(pattern).unsubscribe(queue) == (queue in subscriptions[pattern])
                subscriptions[pattern].discard(queue)
            case "publish":
                expected = {one for name, found in subscriptions.items() if fits(name, topic) for one in found}
                copies = program.topic(topic).publish(number)
                assert [id_.partition(":")[0] for id_ in copies] == sorted(expected), f"seed {seed}"
                published[topic] += 1
                nobody[topic] += not expected
                for one in expected:
                    held[one].append(number)
            case "take":
                assert taken(program, queue) == held[queue], f"seed {seed}"
                held[queue].clear()
            case "delete" if not held[queue]:
                program.queue(queue).delete()
                for found in subscriptions.values():
                    found.discard(queue)
    for queue, numbers in held.items():
        assert taken(app, queue) == numbers, f"seed {seed}"
    infos = {info.name: info for info in app.topics()}
    for name in patterns:
        info = infos.get(name, TopicInfo(name))
        assert set(info.subscribers) == subscriptions[name], f"seed {seed}"
        assert (info.published, info.nobody) == (published.get(name, 0), nobody.get(name, 0)), f"seed {seed}"


def fits(pattern: str, topic: str) -> bool:
    """Tell whether a topic belongs to a pattern, word by word."""
    words, wanted = topic.split("."), pattern.split(".")
    if wanted[-1] == "#":
        wanted.pop()
        if len(words) < len(wanted):
            return False
        words = words[: len(wanted)]
    return len(words) == len(wanted) and all(one in ("*", word) for one, word in zip(wanted, words, strict=True))


def test_a_forked_child_has_sequences_of_its_own(app: Conveyor) -> None:
    """A process that forks after a publish, and its child, publish at the same time: no message is taken for another's."""
    app.topic(TOPIC).subscribe("q")
    app.topic(TOPIC).publish("parent")
    if (child := os.fork()) == 0:
        status = 1
        with suppress(BaseException):
            status = 0 if app.topic(TOPIC).publish("child") else 2
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    app.topic(TOPIC).publish("parent again")
    assert taken(app, "q") == ["parent", "child", "parent again"]


def test_a_program_remembers_so_many_topics(app: Conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Subscribers are remembered for the topics published to last: a program may publish to one of each of its clients."""
    monkeypatch.setattr("conveyor.messaging.topic.MOST_TOPICS", 3)
    app.topic("#").subscribe("q")
    for number in range(5):
        app.topic(f"client.{number}").publish(number)
    assert len(core_of(app).topics._subscribers) == 3
    assert app.topic("client.0").publish(5) != []
    assert taken(app, "q") == [0, 1, 2, 3, 4, 5]
    assert topics.is_pattern("a.*")
