"""The policy of retries: pauses given as a list or by a function, and a bound for the whole."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from conveyor import ConfigurationError, Conveyor, JobFailed, Retry, RetryIn
from conveyor.events import JobDead
from conveyor.ids import made_at_ms, new_id
from conveyor.messaging.queue import Queue
from conveyor.messaging.retry import GiveUp, RetryAfter, after_failure
from conveyor.payload.records import AttemptHistory, Failure, to_json
from conveyor.store.client.client import Client
from support.running_worker import drain


def _fail(policy: Retry, failures: int = 0, error: BaseException | None = None, **context: Any) -> RetryAfter | GiveUp:
    record = to_json(Failure(failures + 1, context.get("now_ms", 0), "ValueError", "no"))
    history = AttemptHistory(failures, failures, 0, context.pop("errors", []))
    return after_failure(policy, history, failures + 1, error or ValueError("no"), record, **context)


def _pause(policy: Retry, failures: int = 0, error: BaseException | None = None) -> int:
    decision = _fail(policy, failures, error)
    assert isinstance(decision, RetryAfter)
    return decision.ms


def test_the_pauses_of_a_list_come_in_order() -> None:
    """Each failure takes the next pause of the list, whatever the cap, and the last is used again."""
    policy = Retry(attempts=9, backoff=["10ms", 2, "1h"], jitter=False)

    assert [_pause(policy, failures) for failures in range(5)] == [10, 2000, 3_600_000, 3_600_000, 3_600_000]
    assert _pause(policy, 0, RetryIn("5s")) == 5000
    assert policy == Retry(attempts=9, backoff=("10ms", 2, "1h"), jitter=False)
    spread = [_pause(Retry(backoff=["10s"])) for _ in range(200)]
    assert 5000 <= min(spread) < max(spread) <= 15_000


def test_a_function_gives_the_pause(caplog: pytest.LogCaptureFixture) -> None:
    """A function gets the attempt that failed and its error; one that fails itself is logged, and the pause doubles."""
    asked: list[tuple[int, str]] = []

    def pause(attempt: int, error: BaseException) -> str:
        asked.append((attempt, str(error)))
        return "7s" if attempt < 3 else "soon"

    policy = Retry(attempts=9, backoff=pause, jitter=False)
    assert [_pause(policy, failures, ValueError(f"n{failures}")) for failures in range(3)] == [7000, 7000, 4000]
    assert asked == [(1, "n0"), (2, "n1"), (3, "n2")]
    [logged] = [record for record in caplog.records if record.name == "conveyor.retry"]
    assert logged.levelno == logging.ERROR
    assert "'soon' is not a duration" in str(logged.exc_info)


def test_within_bounds_the_whole() -> None:
    """A job is dead whose next attempt would begin later than `within` after it was made, or was first due."""
    id_ = new_id()
    made = made_at_ms(id_) or 0
    policy = Retry(attempts=99, backoff="10s", jitter=False, within="1m")

    assert isinstance(_fail(policy, now_ms=made + 50_000, id=id_), RetryAfter)
    late = _fail(policy, now_ms=made + 50_001, id=id_)
    assert isinstance(late, GiveUp)
    assert late.reason == "its next attempt would begin later than the 1 m of retry.within allow"
    assert late.history.failures == 1
    assert isinstance(_fail(policy, now_ms=made + 50_001, id=id_, due_ms=made + 1), RetryAfter)
    assert isinstance(_fail(policy, error=RetryIn("2m"), now_ms=made, id=id_), GiveUp)
    first = [to_json(Failure(1, made, "ValueError", "no"))]
    assert isinstance(_fail(policy, 1, now_ms=made + 60_000, id="order-7"), RetryAfter)
    assert isinstance(_fail(policy, 1, now_ms=made + 60_000, id="order-7", errors=first), GiveUp)


@pytest.mark.parametrize(
    "options",
    [{"backoff": []}, {"backoff": ["soon"]}, {"backoff": [-1]}, {"within": 0}, {"within": "later"}, {"jitter": 1}],
)
def test_a_policy_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    """A list without pauses, a pause that is none, and a bound of nothing are refused where they are written."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Retry(**options)


async def test_jobs_follow_the_policy(url: str) -> None:
    """A worker waits for the pauses of the list, and the time of `within` ends a job that goes on failing."""
    app = Conveyor(url)

    @app.task(retry=Retry(attempts=3, backoff=["5ms", "10ms"]))
    async def twice(numbers: list[int]) -> None:
        raise ConnectionError("away")

    @app.task(retry=Retry(attempts=1000, backoff=["1h"], within="10m"))
    async def late() -> None:
        raise ConnectionError("away")

    reasons = {}
    app.on(JobDead)(lambda event: reasons.update({event.task: event.reason}))
    failing, ending = await twice.aenqueue([1]), await late.aenqueue()
    await drain(app)
    for job in (failing, ending):
        with pytest.raises(JobFailed, match="away"):
            await job.aresult(timeout=60)
    assert reasons[twice.name] == "all 3 attempts failed"
    assert "10 m of retry.within" in reasons[late.name]
    await app.queue("default").apurge(dead=True)
    await app.aclose()


def test_a_refused_message_follows_the_policy(backend: Client) -> None:
    """A `nack()` whose pause would end later than `within` makes a dead letter at once."""
    queue = Queue(backend, "within", lease_ms=2000, retry=Retry(backoff=["1h"], within="10m"))
    queue.push(1)
    [message] = queue.pull()
    message.nack()
    assert queue.stats().dead == 1
    queue.purge(dead=True)
