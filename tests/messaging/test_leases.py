"""The lease session and the detector of dead workers, without a server."""

from __future__ import annotations

import pytest

from conveyor.messaging.leases import DeadWorkerDetector, LeaseSession
from conveyor.messaging.retry import Retry
from conveyor.messaging.settlement import SettlementPolicy
from conveyor.payload.records import AttemptHistory
from conveyor.store.keys import QueueKeys
from conveyor.store.operations import Registration, Settlement, TurnReply, WorkerUnregistered

KEYS = QueueKeys("conveyor", "mail")


def turn(now=1000, *, ids=(), held=None, lost=(), overdue=(), states=(), next_due=None):
    return TurnReply(
        now, len(ids) if held is None else held, next_due, False, list(lost), list(ids), [b"\n\n{}" for _ in ids],
        list(states), list(overdue), [], False,
    )  # fmt: skip


def new_session():
    return LeaseSession(KEYS, 1000, b"{}", DeadWorkerDetector(1000))


def names(calls):
    return [call.script.name for call in calls]


def play(program, replies):
    """Drive a round with the given replies; return the calls it made."""
    calls = []
    try:
        calls.append(next(program))
        for reply in replies:
            if isinstance(reply, int) and calls[-1].script.name == "register":
                reply = Registration(reply, new_queue=False)
            answer = program.throw if isinstance(reply, BaseException) else program.send
            calls += [answer(reply)]
    except StopIteration:
        return calls
    raise AssertionError(f"wants an answer to {calls[-1]}")


class TestDeadWorkerDetector:
    def test_one_look_finds_no_dead_worker(self):
        """An end in the past alone is no proof: every worker's looks so after Redis was frozen."""
        assert DeadWorkerDetector(1000).look(10_000, [("a", 5000)], 1.0) == []

    def test_two_looks_find_a_dead_worker(self):
        """The same end at a look 0.45 lease later, and past: dead."""
        detector = DeadWorkerDetector(1000)
        detector.look(10_000, [("a", 9990)], 1.0)
        assert detector.look(10_400, [("a", 9990)], 1.40) == []
        assert detector.look(10_460, [("a", 9990)], 1.46) == [("a", 9990)]

    def test_a_beat_in_between_keeps_a_worker(self):
        """A moved end begins the observation anew."""
        detector = DeadWorkerDetector(1000)
        detector.look(10_000, [("a", 9990)], 1.0)
        assert detector.look(10_500, [("a", 10_600)], 1.5) == []
        assert detector.look(10_700, [("a", 10_600)], 1.7) == []
        assert detector.look(10_960, [("a", 10_600)], 1.96) == [("a", 10_600)]

    def test_an_end_still_ahead_waits(self):
        """A worker listed before the end of its lease is found dead only when that end has passed."""
        detector = DeadWorkerDetector(1000)
        detector.look(10_000, [("a", 10_490)], 1.0)
        assert detector.look(10_460, [("a", 10_490)], 1.46) == []
        assert detector.look(10_495, [("a", 10_490)], 1.495) == [("a", 10_490)]

    def test_an_end_far_ahead_counts_as_passed(self):
        """After a step of the clock backwards an end lies further ahead than a lease: such a worker is dead too."""
        detector = DeadWorkerDetector(1000)
        detector.look(10_000, [("a", 99_000)], 1.0)
        assert detector.look(10_500, [("a", 99_000)], 1.5) == [("a", 99_000)]

    def test_looks_are_paced(self):
        """Looks are a third of a lease apart, sooner only when a suspect can be decided."""
        detector = DeadWorkerDetector(900)
        assert detector.next_look(5.0) == 0
        detector.look(10_000, [], 5.0)
        assert detector.next_look(5.0) == pytest.approx(0.3)
        assert detector.next_look(5.4) == 0
        detector.look(10_300, [("a", 10_300)], 5.3)
        detector.look(10_600, [("a", 10_300)], 5.6)
        assert detector.next_look(5.6) == pytest.approx(0.105)


class TestTurns:
    def test_registers_first_and_only_once(self):
        """The first round registers, later ones only make turns."""
        session = new_session()
        assert names(play(session.turn(2), [0, turn()])) == ["register", "turn"]
        assert names(play(session.turn(2), [turn()])) == ["turn"]

    def test_a_turn_without_a_reply_is_repeated_with_its_number(self):
        """Given up in the middle, the next round sends the very same call before its own."""
        session = new_session()
        play(session.turn(), [0, turn()])
        given_up = session.turn(1)
        first = next(given_up)
        given_up.close()
        calls = play(session.turn(1), [turn(ids=["a"]), turn(ids=["b"], held=2)])
        assert calls[0] is first
        assert [call.args[1] for call in calls] == ["2", "3"]
        assert [leased.id for leased in session.waiting] == ["a", "b"]

    def test_what_was_settled_before_the_loss_of_the_identity_is_refused(self):
        """After a reap a new identity is registered, and nothing of the old one is reported under it."""
        session = new_session()
        play(session.turn(2), [0, turn(ids=["a", "b"])])
        old, (first, second) = session.worker, session.waiting
        session.settle(first, Settlement("D", "a"))
        calls = play(session.turn(), [WorkerUnregistered(), 0, turn()])
        assert names(calls) == ["turn", "register", "turn"]
        assert calls[-1].args[5] == "0", "nothing is reported under the new name"
        assert session.worker != old
        assert first.lost
        assert second.lost
        assert session.refused == [first]
        assert not session.held

    def test_another_count_is_reconciled(self):
        """Leases that Redis lists and the session does not know go back; those that Redis does not list are lost."""
        session = new_session()
        play(session.turn(2), [0, turn(ids=["a", "b"])])
        lost = session.held["b"]
        calls = play(session.turn(), [turn(held=3), ["a", "x", "y"], turn(held=1)])
        assert names(calls) == ["turn", "held_ids", "turn"]
        assert {calls[-1].args[i] for i in (11, 18)} == {"x", "y"}
        assert calls[-1].args[10] == "F"
        assert lost.lost
        assert list(session.held) == ["a"]

    def test_identity_is_not_used_again_after_it_left(self):
        """An identity that has left leases nothing, because what remains of it expires."""
        session = new_session()
        play(session.turn(1), [0, turn()])
        before = session.worker
        play(session.turn(leave=True), [turn()])
        assert session.worker != before
        assert not session.registered

    def test_due_instant_limits_the_wait(self):
        """An idle consumer wakes for the next due message."""
        session = LeaseSession(KEYS, 60_000, b"{}", DeadWorkerDetector(60_000), clock=lambda: 7.0)
        play(session.turn(1), [0, turn(now=1000, next_due=1200)])
        assert session.wait() == pytest.approx(0.201)
        play(session.turn(1), [turn(now=1000)])
        assert session.wait() == 5.0


class TestSettlementPolicy:
    def leased(self, state=None):
        session = new_session()
        play(session.turn(1), [0, turn(ids=["a"], states=[state])])
        return session.waiting[0]

    def test_failures_are_spent(self):
        """Backoff doubles, and the last attempt of the budget buries."""
        policy = SettlementPolicy(Retry(attempts=2, backoff="2s", jitter=False), "me", lambda: 5)
        first = policy.failed(self.leased(), ValueError("x"))
        assert (first.kind, first.ms) == ("R", 2000)
        second = policy.failed(self.leased(first.state), ValueError("y"))
        assert (second.kind, second.ms) == ("X", 5)
        assert [f.message for f in AttemptHistory.decode(second.state).failures_list()] == ["x", "y"]

    def test_crashes_end_a_message_after_three_starts(self):
        """Each start of a suspect is counted before it; the fourth does not happen."""
        policy = SettlementPolicy(Retry(), "me", lambda: 5)
        assert policy.presumed_crash(self.leased()) is None
        raised = policy.presumed_crash(self.leased(b"1 0 1"))
        assert raised.kind == "M"
        assert AttemptHistory.decode(raised.state).crashes == 2
        assert policy.poison(self.leased(b"2 0 2")) is None
        assert policy.poison(self.leased(b"3 0 3")).kind == "X"
