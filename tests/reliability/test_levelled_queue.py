"""Groups, limits and unique keys: random steps like a model, and every pair of transitions with every kind of unique key."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from conveyor.errors import ConveyorError
from conveyor.store import operations
from reliability.test_queue_model import SEED
from support.levelled_machine import LevelledMachine
from support.script_faults import break_script
from support.seeded_queue import SeededQueue

pytestmark = [pytest.mark.standalone_only("empties the server for each example; what it tests is scripts")]


def run_machine(seeded: SeededQueue, number: int, examples: int = 4, steps: int = 40) -> None:
    """Run the machine with a seed; each example ends with a queue in which nothing of groups, limits and keys is left."""
    run_state_machine_as_test(
        seed(number)(type("Bound", (LevelledMachine,), {"seeded": seeded})),
        settings=settings(
            max_examples=examples, stateful_step_count=steps, derandomize=False, database=None, deadline=None,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
        ),
    )  # fmt: skip


@pytest.mark.row("C290", "D18")
@pytest.mark.long
def test_levelled_queue_and_model_stay_alike(seeded: SeededQueue, rounds: Callable[[int, int], int]) -> None:
    """After any steps each group has its order and one ticket, each slot a holder; what a turn leases may start, and all that may does."""
    for number in range(SEED, SEED + rounds(300, 3)):
        print(f"levelled: 4 examples of 40 steps, seed {number}")
        run_machine(seeded, number)


class Pair(LevelledMachine):
    """One job that has a key, in a group that runs one at a time, with a limit; it is the only one, but for what is pushed with its key."""

    shapes: ClassVar[list[tuple[str | None, tuple[str, ...]]]] = [("a", ("1:two",))]

    def __init__(self, life: str, conflict: str) -> None:
        super().__init__()
        self.life, self.conflict = life, conflict
        self.push_key()

    def _spec(self, kind: str, pick: int, key: str = "", conflict: str = "") -> Any:
        return super()._spec(kind, 3, key, conflict)

    def push_key(self) -> None:
        """Push a job with the key: the first, or one that meets it."""
        entry, job, rank = self._spec("keyed", 3, f"{self.life}0", self.conflict)
        begin = self.seeded.now()
        self._push(0, [(entry, job, rank)], 0)
        for id_ in self.model.due if self.conflict == "b" else ():
            if self.model.due[id_] == rank:  # a debounced job waits anew, for as long as the last call says
                assert self.seeded.redis.zscore(self.keys.due, id_) >= begin + (entry.delay_ms or 0)

    def holder(self) -> tuple[str, list[str]] | None:
        """Return a worker that holds a job, and what it holds."""
        return next(((name, [*one.leases]) for name, one in self.model.members.items() if one.leases), None)

    def end(self, kind: str) -> None:
        """Let the worker that holds something settle all of it."""
        found = self.holder()
        assert found is not None
        self.workers[0] = found[0]
        self.turn(0, 0, [kind] * len(found[1]), False, 99, "")

    def reap_holder(self, how: str) -> None:
        """Let the worker die or leave."""
        found = self.holder()
        assert found is not None
        self._run(operations.reap(self.keys, found[0], crashed=how == "crash"))
        self.model.reap(found[0], crashed=how == "crash")

    def ask(self, *, delete: bool) -> None:
        """Cancel or delete the first job there is."""
        id_ = next(iter(self.model.jobs))
        assert self._run(operations.cancel(self.keys, id_, delete=delete)) == self.model.cancel(id_, delete=delete)


WAITS, RUNS, DUE, DEAD, ANYWHERE, FOLLOWED = "waits", "runs", "due", "dead", "anywhere", "followed"
TRANSITIONS: dict[str, tuple[str, Callable[[Pair], Any]]] = {
    "push": (ANYWHERE, Pair.push_key),
    "lease": (WAITS, lambda one: one.turn(1, 1, [], True, 99, "")),
    "cancel": (ANYWHERE, lambda one: one.ask(delete=False)),
    "delete": (ANYWHERE, lambda one: one.ask(delete=True)),
    "purge": (WAITS, lambda one: one.purge("ready", 1)),
    "purge scheduled": (DUE, lambda one: one.purge("due", 1)),
    "purge dead": (DEAD, lambda one: one.purge("dead", 1)),
    "purge reruns": (RUNS, lambda one: one.purge("rerun", 1)),
    "redrive": (DEAD, lambda one: one.redrive(9, 0, False)),
    "promote": (DUE, lambda one: one.becomes_due(0, True)),
    "becomes due": (DUE, lambda one: one.becomes_due(0, False)),
    "crash": (RUNS, lambda one: one.reap_holder("crash")),
    "leave": (RUNS, lambda one: one.reap_holder("leave")),
    **{kind: (RUNS, lambda one, kind=kind: one.end(kind)) for kind in ("done", "D", "C", "X", "R", "F", "L", "M", "K")},
}
"""Each transition of a job → where the job must be before, and how it happens."""
POLICIES = [f"{life}{conflict}" for life in "dst" for conflict in ("kraxb" if life == "s" else "krax")]
BEFORE: dict[str, list[str]] = {
    WAITS: [],
    RUNS: ["lease"],
    DUE: ["lease", "R"],
    DEAD: ["lease", "X"],
    FOLLOWED: ["lease", "push"],
}
"""Each place of a job → the steps that bring a job there."""


def place_of(one: Pair) -> set[str]:
    """Return the places where there is a job."""
    model = one.model
    waits = any(model.groups.values()) or any(model.ready.values())
    found = {WAITS: waits, RUNS: one.holder() is not None, DUE: bool(model.due), DEAD: bool(model.dead)}
    return {place for place, is_there in found.items() if is_there} | ({ANYWHERE} if model.jobs else set())


def pairs() -> list[tuple[str, str, str]]:
    """Return all of (a place, a first transition from there, a second one)."""
    return [
        (place, first, second)
        for place in BEFORE
        for first, second in itertools.product(TRANSITIONS, repeat=2)
        if TRANSITIONS[first][0] in {RUNS if place == FOLLOWED else place, ANYWHERE}
    ]


def check_pair(seeded: SeededQueue, policy: str, place: str, first: str, second: str) -> bool:
    """Carry out two transitions, and let all drain; return False when the second is none that can follow."""
    one = type("Bound", (Pair,), {"seeded": seeded})(policy[0], policy[1])
    begin = ["promote"] if policy[1] == "b" else []  # a debounced job is scheduled
    for name in [*begin, *BEFORE[place], first, second]:
        where, act = TRANSITIONS[name]
        if where not in place_of(one):
            return False
        act(one)
    one.is_alike()
    one.drain()
    return True


@pytest.mark.row("C290", "D18")
@pytest.mark.parametrize("policy", POLICIES)
def test_every_pair_of_transitions(seeded: SeededQueue, policy: str, rounds: Callable[[int, int], int]) -> None:
    """
    From each place two transitions follow each other, with this key: like the model, and then nothing outlives the job.

    A short run takes each third pair, another third for each kind of key.
    """
    every = rounds(1, 3)
    count = 0
    for place, first, second in pairs()[POLICIES.index(policy) % every :: every]:
        newcomer = place == FOLLOWED or "push" in {first, second}
        # Newcomers' effect is all that differs, and only one that is to run again afterwards follows a job that runs.
        if newcomer if policy[1] == "a" else policy[1] == "k" or (newcomer and place != FOLLOWED):
            count += check_pair(seeded, policy, place, first, second)
    print(f"{count} pairs")
    assert count > (100 if policy[1] in "ka" else 30) // every


# what is broken → the kind of key whose pairs see it, the script, the line, what stands there instead
SABOTAGES = {
    "a key outlives its job": ("dk, waits, push, push", "TURN", "redis.pcall('GET', name) == id then redis.call('DEL', name) end", "false then end"),
    "the keys of many jobs outlive them": ("dk, waits, lease, done", "TURN", "if found > 0 then redis.call('DEL', unpack(own)) end", ""),
    "a key outlives a purge": ("dk, waits, push, purge", "PURGE", "if found then release(prefix, id, found) end", ""),
    "a key outlives the start": ("sk, waits, push, lease", "TURN", "if key.life == 's' and", "if false and"),
    "a window ends with its job": ("tk, waits, push, push", "TURN", "if not ended then free(true) end", "free(true)"),
    "the key of another job is taken": ("sk, runs, push, done", "TURN", "if holders[i - first + 1] == owners[first_owner + i] then", "if true then"),
    "a rerun is forgotten": ("da, waits, lease, push", "TURN", "free(false)\nadmit_successor(prefix, id)", "free(false)"),
    "the reruns of many jobs are forgotten": ("da, runs, push, done", "TURN", "if not is_lost[words[i]] then admit_successor(queue.prefix, words[i]) end", ""),
    "a rerun is forgotten with a worker": ("da, followed, cancel, crash", "REAP", "free(false)\nadmit_successor(prefix, id)", "free(false)"),
    "a rerun is forgotten by a cancellation": ("da, followed, crash, cancel", "CANCEL", "free(false)\nadmit_successor(prefix, id)", "free(false)"),
    "a change while the job runs is forgotten": ("da, waits, lease, push", "PUSH", "return {'rerun', id, behind = holder}", "return {'kept', holder}"),
    "a debounced job keeps the first": ("sb, waits, push, push", "PUSH", "redis.call('HSET', queue.jobs, id, head .. text .. rest)", ""),
    "a debounced job does not wait anew": ("sb, runs, push, push", "PUSH", "redis.call('ZADD', queue.due, int(instant), id)", ""),
    "two of one key run": ("da, waits, lease, push", "PUSH", "if place == 'waits' then\nqueue", "if true then\nqueue"),
    "a ticket is doubled": ("dk, waits, cancel, push", "PUSH", "if length == 1 then", "if true then"),
    "a slot is given back to nobody": ("dk, waits, lease, crash", "REAP", "give_back(queue, grouped)", ""),
    "the baton is dropped": ("da, runs, L, lease", "TURN", "if room >= cost then", "if false then"),
    "a waiting ticket is admitted twice": ("da, runs, L, lease", "TURN", "redis.call('ZPOPMIN', queue.prefix .. 'limit:' .. name, int(math.max(1, math.min(room, most))))", "redis.call('ZRANGE', queue.prefix .. 'limit:' .. name, 0, 0, 'WITHSCORES')"),
    "a retry loses its place": ("sk, runs, push, R", "TURN", "slots[i] ~= false)", "false)"),
    "a retry gives its key to the next": ("sk, waits, lease, R", "TURN", "give_back(queue, queue.retried, true)", "give_back(queue, queue.retried)"),
    "a returned job loses its place": ("sk, runs, push, F", "TURN", "join_group(queue, priority, group, id, true)", "join_group(queue, priority, group, id)"),
    "the jobs of a dead worker lose their place": ("sk, runs, push, crash", "REAP", "join_group(queue, groups[i][1], groups[i][2], id, true)", "join_group(queue, groups[i][1], groups[i][2], id)"),
    "two of a strict group run": ("sk, runs, push, lease", "TURN", "return closed and 1 - s.count or 1000000", "return closed and 2 - s.count or 1000000"),
}  # fmt: skip


@pytest.mark.parametrize("name", SABOTAGES)
def test_sabotage_is_caught(seeded: SeededQueue, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One of the pairs sees each of these defects, without any chance: a job in the wrong place, or something that outlives it."""
    pair, *fault = SABOTAGES[name]
    policy, place, first, second = pair.split(", ")
    assert (place, first, second) in pairs()
    assert check_pair(seeded, policy, place, first, second)
    break_script(monkeypatch, operations, *fault)
    with pytest.raises((AssertionError, ConveyorError, LookupError)) as caught:
        check_pair(seeded, policy, place, first, second)
    assert "user_script" not in str(caught.value), "the sabotage does not even run"
