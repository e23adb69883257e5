"""
Four clients at once on one queue, and the model led through all their steps in the order of the server.

Scripts are atomic, so there is one such order, and MONITOR tells it: the n-th command from a client's port is its n-th
step. In that order the model must have given every answer that the clients got, whatever overtook what.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from conveyor.payload.records import read_envelope
from conveyor.store import operations
from conveyor.store.client.client import Client
from conveyor.store.keys import QueueKeys
from conveyor.store.operations import (
    Entry,
    ProducerSequence,
    Settlement,
    StalePush,
    StaleTurn,
    TurnReport,
    WorkerUnregistered,
)
from conveyor.store.script import Script
from support.queue_model import Job, Model, ModelWorker
from support.seeded_queue import LEASE, REST
from support.state_machine import same_turn

KEYS = QueueKeys("c", "q")
KINDS = ["keep", "keep", "done", "done", "D", "C", "X", "R0", "R", "F", "F-", "M", "K"]
STEPS = {
    "push": 20, "push_plain": 8, "turn": 40, "again": 14, "token": 6, "reap": 4, "extend": 5, "cancel": 8, "redrive": 3,
    "promote": 4, "purge": 2, "pause": 3, "wait": 6, "beat": 3,
}  # fmt: skip


@dataclass
class ReplayState:
    """The model, and the state it needs to tell a repeat from a late copy."""

    model: Model = field(default_factory=Model)
    lanes: dict[str, tuple[int, Any]] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)  # who has left → its last turn
    died: dict[str, int] = field(default_factory=dict)  # dead letter → ms
    known: bool = False  # the queue was pushed to, or a worker has registered: it is not new any more


Check = Callable[[ReplayState, Any], None]


@dataclass
class Step:
    """One step: the function that sends it, maybe more than once, and the check of its reply against the model."""

    name: str
    send: Callable[[Client], Any]
    check: Check


@dataclass
class SharedState:
    """The state that all clients share."""

    base: int
    count: Any = field(default_factory=lambda: itertools.count(1))
    ids: list[str] = field(default_factory=lambda: ["ghost"])
    workers: list[str] = field(default_factory=list)
    sent: list[Step] = field(default_factory=list)  # pushes and turns, which may arrive again and late


class SimulatedClient:
    """A client that acts as producer, worker and operator, with one connection and one call at a time."""

    def __init__(self, url: str, shared: SharedState, name: str, seed: str) -> None:
        self.name, self.shared, self.rng = name, shared, random.Random(seed)
        self.client = Client(url, namespace="c", retry_for=0)
        self.lane = ProducerSequence(f"L{name}")
        self.held: dict[str, dict[str, tuple[str, bool]]] = {}  # worker → id → attributes, own id
        self.turns: dict[str, int] = {}
        self.history: list[tuple[Step, Any]] = []
        self.broken: BaseException | None = None

    def run_steps(self, steps: int) -> None:
        try:
            self.client.execute("ECHO", f"client {self.name}")
            for _ in range(steps):
                getattr(self, self.rng.choices(list(STEPS), list(STEPS.values()))[0])()
        except BaseException as error:
            self.broken = error
        finally:
            self.client.close()

    def carry_out(self, step: Step) -> Any:
        try:
            reply = step.send(self.client)
        except (StalePush, StaleTurn, WorkerUnregistered) as error:
            reply = error
        self.history.append((step, reply))
        return reply

    def run(self, name: str, call: Any, answer: Callable[[ReplayState], Any]) -> Any:
        """Carry out a step whose answer is compared as it is."""

        def check(replayed: ReplayState, reply: Any) -> None:
            expected = answer(replayed)
            assert reply == expected, f"{reply} instead of {expected}"

        return self.carry_out(Step(name, lambda backend: backend.run(call), check))

    def some(self, names: list[str]) -> str:
        """Return one of the newer ones."""
        return names[-1 - min(int(self.rng.expovariate(0.1)), len(names) - 1)]

    # -- producers ------------------------------------------------------------------------------------------------

    def spec(self) -> tuple[Entry, Job, float | None]:
        number, kind, rank = (
            next(self.shared.count),
            self.rng.choice(["plain", "urgent", "later", "own", "all", "front"]),
            None,
        )
        entry, job = Entry(f"j{number:05}", REST, front=kind == "front"), Job()
        if kind in {"urgent", "all"}:
            entry.priority = job.priority = self.rng.randint(1, 9)
        if kind in {"later", "all"}:
            entry.due_at_ms, rank = self.shared.base + 10**9 + number, 2e6 + number
        if kind in {"own", "all"}:
            entry.id, entry.own_id, job.own = f"own{self.rng.randrange(9)}", True, True
            entry.unique = job.unique = f"k{self.rng.randrange(3)}"
        if self.rng.random() < 0.05:
            entry.expires_ms, job.expired = 0, True
        return entry, job, rank

    def push(self, plain: bool = False) -> None:
        made = [self.spec() for _ in range(self.rng.randint(1, 4))]
        if plain:
            made = [(Entry(f"j{next(self.shared.count):05}", REST), Job(), None) for _ in made]
            pairs = [part for entry, _, _ in made for part in (entry.id, entry.rest)]
            call: Any = operations.push_plain(KEYS, self.lane, pairs)
        else:
            call = operations.push(KEYS, self.lane, [entry for entry, _, _ in made])
        lane, number = self.lane.identity, self.lane.number

        def check(replayed: ReplayState, reply: Any) -> None:
            last, answer = replayed.lanes.get(lane, (0, None))
            if number < last:
                assert isinstance(reply, StalePush)
                return
            if number > last:
                ids, changed = list[str](), list[str]()
                for entry, job, rank in made:
                    id_, done = replayed.model.push(entry.id, job, rank, entry.front, changed)
                    ids.append(id_)
                    if done != "kept":  # what stays as it was may have expired before this push
                        changed.append(id_)
                answer = not replayed.known if plain else ids
                replayed.lanes[lane], replayed.known = (number, answer), True
            assert reply == answer, f"{reply} instead of {answer}"

        step = Step(f"push {number} of {lane}", lambda backend: backend.run(call), check)
        self.shared.sent.append(step)
        self.carry_out(step)
        self.shared.ids += [entry.id for entry, _, _ in made]

    def push_plain(self) -> None:
        self.push(plain=True)

    def again(self) -> None:
        """A push or turn of anybody arrives once more, perhaps while it is under way."""
        if self.shared.sent:
            self.carry_out(self.shared.sent[-1 - min(int(self.rng.expovariate(0.5)), len(self.shared.sent) - 1)])

    # -- workers --------------------------------------------------------------------------------------------------

    def worker(self) -> str:
        if len(self.held) < 2:
            name = f"w{next(self.shared.count)}"

            def answer(replayed: ReplayState) -> bool:
                replayed.model.members[name], replayed.known = ModelWorker(), True
                return True

            call = operations.register(KEYS, name, LEASE, b"{}")
            call.decode = bool
            self.run(f"register {name}", call, answer)
            self.add_worker(name)
        return self.rng.choice(list(self.held))

    def add_worker(self, name: str, held: dict[str, tuple[str | None, bool]] | None = None) -> None:
        self.held[name], self.turns[name] = held or {}, 0
        self.shared.workers.append(name)

    def settle(self, kind: str, id_: str, marks: tuple[str, bool]) -> tuple[Settlement | None, tuple[str, str, Any]]:
        """Return what is sent (None: simply done) and what the model is told."""
        if kind == "done" and not any(marks):
            return None, ("done", id_, None)
        if kind in {"F-", "K"}:
            return Settlement(kind[0], id_), (kind[0], id_, None)
        letter, number = "D" if kind == "done" else kind[0], next(self.shared.count)
        doubt = self.rng.choice([b"+", b"*"]) if kind == "M" else b""
        after = (number, self.rng.randrange(3), self.rng.randrange(3) + len(doubt), doubt)
        sent = Settlement(letter, id_, 600_000 if letter in "DC" else 0, b"{}", b"%d %d %d%b" % after, *marks)
        if letter != "R":
            return sent, (letter, id_, after)
        sent.ms = 0 if kind == "R0" else 2 * 10**9 + number * 10_000
        return sent, ("R", id_, (1e6 if kind == "R0" else 3e6 + number, after))

    def turn(self) -> bool:
        name, rng = self.worker(), self.rng
        held, want, leave = self.held[name], rng.choice([0, 1, 2, 5]), rng.random() < 0.1
        pairs = [self.settle(kind, id_, held[id_]) for id_ in list(held) if (kind := rng.choice(KINDS)) != "keep"]
        if rng.random() < 0.1 and (stranger := self.some(self.shared.ids)) not in held:
            pairs.append(self.settle(rng.choice(KINDS[2:]), stranger, ("", False)))
        plain = "kept" if rng.random() < 0.5 else "done"
        done = [(plain, told[1], told[2]) for sent, told in pairs if sent is None]
        others = [(sent, told) for sent, told in pairs if sent is not None]
        told = done + [told for _, told in others]
        self.turns[name] = number = self.turns[name] + 1
        report = TurnReport([id_ for _, id_, _ in done], [sent for sent, _ in others])
        if plain == "kept":
            report.results = dict.fromkeys(report.done, (600_000, b"{}"))
        call = operations.turn(KEYS, name, number, want, LEASE, report, flags="t" if leave else "")

        def check(replayed: ReplayState, reply: Any) -> None:
            model, member = replayed.model, replayed.model.members.get(name)
            if member is None and replayed.left.get(name) == number:
                assert (reply.ids, reply.lost, reply.held) == ([], [], 0)
            elif member is None:
                assert isinstance(reply, WorkerUnregistered)
            elif number < member.turn:
                assert isinstance(reply, StaleTurn)
            elif number == member.turn:
                assert (reply.ids, reply.lost, reply.held) == (model.again(name), [], len(member.leases))
            else:
                buried = len(model.dead)
                same_turn(reply, model.turn(name, want, told, leave=leave), paused=model.paused)
                replayed.died |= dict.fromkeys(model.dead[buried:], reply.now)
                model.dead.sort(key=lambda id_: (replayed.died[id_], id_))
                if name not in model.members:
                    replayed.left[name] = number

        step = Step(f"turn {number} of {name}", lambda backend: backend.run(call), check)
        self.shared.sent.append(step)
        reply = self.carry_out(step)
        if isinstance(reply, Exception) or (leave and reply.held == 0):
            del self.held[name]
            return not isinstance(reply, Exception)
        for kind, id_, _ in told:
            if kind not in {"M", "K"}:
                held.pop(id_, None)
        envelopes = map(read_envelope, reply.envelopes)
        held |= {id_: (found.attributes, found.own_id) for id_, found in zip(reply.ids, envelopes, strict=True)}
        return True

    def token(self) -> None:
        """Pop the wake token, then make the turns that taking it requires."""

        def check(replayed: ReplayState, reply: Any) -> None:
            assert (reply is not None) is replayed.model.token
            replayed.model.token = False

        reply = self.carry_out(Step("token", lambda backend: backend.execute("LPOP", KEYS.wake), check))
        while reply is not None and not self.turn():
            pass

    def reap(self) -> None:
        if not self.shared.workers:
            return
        name, crashed, blame = self.some(self.shared.workers), self.rng.random() < 0.7, None
        if crashed and self.rng.random() < 0.5:
            blame = list(self.held.get(name, {}))[::2], list(self.held.get(name, {}))[::3]

        def answer(replayed: ReplayState) -> int:
            if name not in replayed.model.members:
                return self.gone(replayed, name)
            return replayed.model.reap(name, crashed=crashed, blame=blame)

        self.run(f"reap {name}", operations.reap(KEYS, name, crashed=crashed, blame=blame), answer)

    @staticmethod
    def gone(replayed: ReplayState, name: str) -> int:
        if replayed.left.pop(name, None) is None:
            return -1
        replayed.model.wake_for_the_rest()
        return 0  # the memory of who has left goes, too

    def extend(self) -> None:
        name = self.worker()
        if not self.held[name]:
            return
        id_, heir = self.rng.choice(list(self.held[name])), f"x{next(self.shared.count)}"
        call = operations.extend(KEYS, name, id_, heir, LEASE, b"{}")
        marks = self.held[name].pop(id_)
        if self.run(f"extend {id_} of {name} to {heir}", call, lambda replayed: replayed.model.extend(name, id_, heir)):
            self.add_worker(heir, {id_: marks})

    def beat(self) -> None:
        if self.shared.workers:
            name = self.some(self.shared.workers)
            self.run(
                f"beat {name}", operations.heartbeat(KEYS, name, LEASE), lambda replayed: name in replayed.model.members
            )

    # -- people ---------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        id_, delete = self.some(self.shared.ids), self.rng.random() < 0.3
        call = operations.cancel(KEYS, id_, delete=delete)
        self.run(f"cancel {id_}", call, lambda replayed: replayed.model.cancel(id_, delete=delete))

    def redrive(self) -> None:
        limit = self.rng.choice([1, 2, 100])
        call = operations.redrive(KEYS, limit=limit)
        self.run("redrive", call, lambda replayed: replayed.model.redrive(replayed.model.dead[:limit]))

    def promote(self) -> None:
        id_ = self.some(self.shared.ids)
        self.run(f"promote {id_}", operations.promote(KEYS, id_), lambda replayed: replayed.model.promote(id_))

    def purge(self) -> None:
        place, limit = self.rng.choice(["ready", "due", "dead"]), self.rng.choice([1, 2, 100])
        self.run(
            f"purge {place}", operations.purge(KEYS, place, limit), lambda replayed: replayed.model.purge(place, limit)
        )

    def pause(self) -> None:
        paused = self.rng.random() < 0.3
        call = operations.configure(KEYS, "paused", "1" if paused else "")
        call.decode = lambda _: None
        self.run(f"paused: {paused}", call, lambda replayed: replayed.model.configure(paused=paused))

    def wait(self) -> None:
        id_, channel = self.some(self.shared.ids), self.name
        if self.rng.random() < 0.3:
            call: Any = operations.forget(KEYS, id_, channel)
            call.decode = lambda _: None
            self.run(f"forget {id_}", call, lambda replayed: replayed.model.forget(id_, channel))
        else:
            call = operations.await_result(KEYS, id_, channel)
            call.decode = lambda reply: reply[0].decode()
            self.run(f"wait for {id_}", call, lambda replayed: replayed.model.wait(id_, channel))


def run_clients(client: Any, url: str, seed: int, steps: int) -> list[tuple[str, Step, Any]]:
    """Run four clients on an emptied server; return (client, step, answer) in the server's order."""
    client.flushall()
    for script in vars(operations).values():
        if isinstance(script, Script) and script.name.islower():
            client.script_load(script.text)  # so that each step is one command
    seconds, micros = client.time()
    shared = SharedState(seconds * 1000 + micros // 1000)
    clients = [SimulatedClient(url, shared, name, f"{seed} {name}") for name in ("a", "b", "c", "d")]
    with client.monitor() as monitor:
        threads = [threading.Thread(target=one.run_steps, args=(steps,)) for one in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        client.echo("all done")
        ports, order = {}, []
        while (told := monitor.next_command())["command"] != "ECHO all done":
            name, port = told["command"].split(" ", 1)[0].upper(), told["client_port"]
            if told["client_type"] == "lua":
                continue
            if name == "ECHO":
                ports[port] = told["command"].rpartition(" ")[2]
            elif name in {"EVALSHA", "EVAL", "LPOP"}:
                order.append(ports[port])
    for one in clients:
        if one.broken is not None:
            raise one.broken
        assert order.count(one.name) == len(one.history), "a step was more than one command"
    left = {one.name: iter(one.history) for one in clients}
    return [(name, *next(left[name])) for name in order]


def replay(history: list[tuple[str, Step, Any]]) -> Model:
    """Lead the model through it; it must agree with every answer."""
    replayed = ReplayState()
    for place, (name, step, reply) in enumerate(history):
        try:
            step.check(replayed, reply)
        except AssertionError as error:
            lines = [f"{one} {what.name}: {said!r}" for one, what, said in history[max(0, place - 40) : place + 1]]
            raise AssertionError("\n".join([*lines, f"step {place} of {name}: {error}"])) from error
    return replayed.model
