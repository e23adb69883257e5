"""
Four clients at once on one queue, and the model led through all they did, in the order in which the server did it.

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
from support.queue_model import Job, Member, Model
from support.seeded_queue import LEASE, REST
from support.state_machine import same_turn

KEYS = QueueKeys("c", "q")
KINDS = ["keep", "keep", "done", "done", "D", "C", "X", "R0", "R", "F", "M"]
STEPS = {
    "push": 20, "push_plain": 8, "turn": 40, "again": 14, "token": 6, "reap": 4, "extend": 5, "cancel": 8, "redrive": 3,
    "promote": 4, "purge": 2, "pause": 3, "wait": 6, "beat": 3,
}  # fmt: skip


@dataclass
class World:
    """The model, and what it needs besides to tell a repeat from a late copy."""

    model: Model = field(default_factory=Model)
    lanes: dict[str, tuple[int, Any]] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)  # who has left → its last turn
    died: dict[str, int] = field(default_factory=dict)  # dead letter → ms


Check = Callable[[World, Any], None]


@dataclass
class Step:
    """What is sent, maybe more than once, and what the model says to the answer."""

    name: str
    send: Callable[[Client], Any]
    check: Check


@dataclass
class Town:
    """What all clients know of."""

    base: int
    count: Any = field(default_factory=lambda: itertools.count(1))
    ids: list[str] = field(default_factory=lambda: ["ghost"])
    workers: list[str] = field(default_factory=list)
    sent: list[Step] = field(default_factory=list)  # pushes and turns, which may arrive again and late


class SimulatedClient:
    """A producer, a worker and a person, with one connection and one thing at a time under way."""

    def __init__(self, url: str, town: Town, name: str, seed: str) -> None:
        self.name, self.town, self.dice = name, town, random.Random(seed)
        self.client = Client(url, namespace="c", patience=0)
        self.lane = ProducerSequence(f"L{name}")
        self.held: dict[str, dict[str, tuple[str | None, bool]]] = {}  # worker → id → unique key, own id
        self.turns: dict[str, int] = {}
        self.history: list[tuple[Step, Any]] = []
        self.broken: BaseException | None = None

    def live(self, steps: int) -> None:
        try:
            self.client.execute("ECHO", f"client {self.name}")
            for _ in range(steps):
                getattr(self, self.dice.choices(list(STEPS), list(STEPS.values()))[0])()
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

    def run(self, name: str, call: Any, answer: Callable[[World], Any]) -> Any:
        """Carry out a step whose answer is compared as it is."""

        def check(world: World, reply: Any) -> None:
            expected = answer(world)
            assert reply == expected, f"{reply} instead of {expected}"

        return self.carry_out(Step(name, lambda backend: backend.run(call), check))

    def some(self, names: list[str]) -> str:
        """Return one of the newer ones."""
        return names[-1 - min(int(self.dice.expovariate(0.1)), len(names) - 1)]

    # -- producers ------------------------------------------------------------------------------------------------

    def spec(self) -> tuple[Entry, Job, float | None]:
        number, kind, rank = (
            next(self.town.count),
            self.dice.choice(["plain", "urgent", "later", "own", "all", "front"]),
            None,
        )
        entry, job = Entry(f"j{number:05}", REST, front=kind == "front"), Job()
        if kind in {"urgent", "all"}:
            entry.priority = job.priority = self.dice.randint(1, 9)
        if kind in {"later", "all"}:
            entry.due_at_ms, rank = self.town.base + 10**9 + number, 2e6 + number
        if kind in {"own", "all"}:
            entry.id, entry.own_id, job.own = f"own{self.dice.randrange(9)}", True, True
            entry.unique = job.unique = f"k{self.dice.randrange(3)}"
        if self.dice.random() < 0.05:
            entry.expires_ms, job.expired = 0, True
        return entry, job, rank

    def push(self, plain: bool = False) -> None:
        made = [self.spec() for _ in range(self.dice.randint(1, 4))]
        if plain:
            made = [(Entry(f"j{next(self.town.count):05}", REST), Job(), None) for _ in made]
            pairs = [part for entry, _, _ in made for part in (entry.id, entry.rest)]
            call: Any = operations.push_plain(KEYS, self.lane, pairs)
        else:
            call = operations.push(KEYS, self.lane, [entry for entry, _, _ in made])
        lane, number = self.lane.identity, self.lane.number

        def check(world: World, reply: Any) -> None:
            last, answer = world.lanes.get(lane, (0, None))
            if number < last:
                assert isinstance(reply, StalePush)
                return
            if number > last:
                answer = [world.model.push(entry.id, job, rank, entry.front) for entry, job, rank in made]
                world.lanes[lane] = (number, answer)
            assert reply == (None if plain else answer)

        step = Step(f"push {number} of {lane}", lambda backend: backend.run(call), check)
        self.town.sent.append(step)
        self.carry_out(step)
        self.town.ids += [entry.id for entry, _, _ in made]

    def push_plain(self) -> None:
        self.push(plain=True)

    def again(self) -> None:
        """A push or turn of anybody arrives once more, perhaps while it is under way."""
        if self.town.sent:
            self.carry_out(self.town.sent[-1 - min(int(self.dice.expovariate(0.5)), len(self.town.sent) - 1)])

    # -- workers --------------------------------------------------------------------------------------------------

    def worker(self) -> str:
        if len(self.held) < 2:
            name = f"w{next(self.town.count)}"

            def answer(world: World) -> bool:
                world.model.members[name] = Member()
                return True

            call = operations.register(KEYS, name, LEASE, b"{}")
            call.decode = bool
            self.run(f"register {name}", call, answer)
            self.hire(name)
        return self.dice.choice(list(self.held))

    def hire(self, name: str, held: dict[str, tuple[str | None, bool]] | None = None) -> None:
        self.held[name], self.turns[name] = held or {}, 0
        self.town.workers.append(name)

    def settle(
        self, kind: str, id_: str, marks: tuple[str | None, bool]
    ) -> tuple[Settlement | None, tuple[str, str, Any]]:
        """Return what is sent (None: simply done) and what the model is told."""
        if kind == "done" and not any(marks):
            return None, ("done", id_, None)
        letter, number = "D" if kind == "done" else kind[0], next(self.town.count)
        doubt = self.dice.choice([b"+", b"*"]) if kind == "M" else b""
        after = (number, self.dice.randrange(3), self.dice.randrange(3) + len(doubt), doubt)
        sent = Settlement(letter, id_, 600_000 if letter in "DC" else 0, b"{}", b"%d %d %d%b" % after, *marks)
        if letter != "R":
            return sent, (letter, id_, after)
        sent.ms = 0 if kind == "R0" else 2 * 10**9 + number * 10_000
        return sent, ("R", id_, (1e6 if kind == "R0" else 3e6 + number, after))

    def turn(self) -> bool:
        name, dice = self.worker(), self.dice
        held, want, leave = self.held[name], dice.choice([0, 1, 2, 5]), dice.random() < 0.1
        pairs = [self.settle(kind, id_, held[id_]) for id_ in list(held) if (kind := dice.choice(KINDS)) != "keep"]
        if dice.random() < 0.1 and (stranger := self.some(self.town.ids)) not in held:
            pairs.append(self.settle(dice.choice(KINDS[2:]), stranger, (None, False)))
        done = [told for sent, told in pairs if sent is None]
        others = [(sent, told) for sent, told in pairs if sent is not None]
        told = done + [told for _, told in others]
        self.turns[name] = number = self.turns[name] + 1
        report = TurnReport([id_ for _, id_, _ in done], [sent for sent, _ in others])
        call = operations.turn(KEYS, name, number, want, LEASE, report, flags="t" if leave else "")

        def check(world: World, reply: Any) -> None:
            model, member = world.model, world.model.members.get(name)
            if member is None and world.left.get(name) == number:
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
                world.died |= dict.fromkeys(model.dead[buried:], reply.now)
                model.dead.sort(key=lambda id_: (world.died[id_], id_))
                if name not in model.members:
                    world.left[name] = number

        step = Step(f"turn {number} of {name}", lambda backend: backend.run(call), check)
        self.town.sent.append(step)
        reply = self.carry_out(step)
        if isinstance(reply, Exception) or (leave and reply.held == 0):
            del self.held[name]
            return not isinstance(reply, Exception)
        for kind, id_, _ in told:
            if kind != "M":
                held.pop(id_, None)
        envelopes = map(read_envelope, reply.envelopes)
        held |= {id_: (found.unique, found.own_id) for id_, found in zip(reply.ids, envelopes, strict=True)}
        return True

    def token(self) -> None:
        """Take the wake-up token, then make the turns that whoever takes it owes."""

        def check(world: World, reply: Any) -> None:
            assert (reply is not None) is world.model.token
            world.model.token = False

        reply = self.carry_out(Step("token", lambda backend: backend.execute("LPOP", KEYS.wake), check))
        while reply is not None and not self.turn():
            pass

    def reap(self) -> None:
        if not self.town.workers:
            return
        name, crashed, blame = self.some(self.town.workers), self.dice.random() < 0.7, None
        if crashed and self.dice.random() < 0.5:
            blame = list(self.held.get(name, {}))[::2], list(self.held.get(name, {}))[::3]

        def answer(world: World) -> int:
            if name not in world.model.members:
                return self.gone(world, name)
            return world.model.reap(name, crashed=crashed, blame=blame)

        self.run(f"reap {name}", operations.reap(KEYS, name, crashed=crashed, blame=blame), answer)

    @staticmethod
    def gone(world: World, name: str) -> int:
        return 0 if world.left.pop(name, None) is not None else -1  # the memory of who has left goes, too

    def extend(self) -> None:
        name = self.worker()
        if not self.held[name]:
            return
        id_, heir = self.dice.choice(list(self.held[name])), f"x{next(self.town.count)}"
        call = operations.extend(KEYS, name, id_, heir, LEASE, b"{}")
        marks = self.held[name].pop(id_)
        if self.run(f"extend {id_} of {name} to {heir}", call, lambda world: world.model.extend(name, id_, heir)):
            self.hire(heir, {id_: marks})

    def beat(self) -> None:
        if self.town.workers:
            name = self.some(self.town.workers)
            self.run(f"beat {name}", operations.heartbeat(KEYS, name, LEASE), lambda world: name in world.model.members)

    # -- people ---------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        id_, delete = self.some(self.town.ids), self.dice.random() < 0.3
        call = operations.cancel(KEYS, id_, delete=delete)
        self.run(f"cancel {id_}", call, lambda world: world.model.cancel(id_, delete=delete))

    def redrive(self) -> None:
        limit = self.dice.choice([1, 2, 100])
        call = operations.redrive(KEYS, limit=limit)
        self.run("redrive", call, lambda world: world.model.redrive(world.model.dead[:limit]))

    def promote(self) -> None:
        id_ = self.some(self.town.ids)
        self.run(f"promote {id_}", operations.promote(KEYS, id_), lambda world: world.model.promote(id_))

    def purge(self) -> None:
        place, limit = self.dice.choice(["ready", "due", "dead"]), self.dice.choice([1, 2, 100])
        self.run(f"purge {place}", operations.purge(KEYS, place, limit), lambda world: world.model.purge(place, limit))

    def pause(self) -> None:
        paused = self.dice.random() < 0.3
        call = operations.configure(KEYS, "paused", "1" if paused else "")
        call.decode = lambda _: None
        self.run(f"paused: {paused}", call, lambda world: world.model.configure(paused=paused))

    def wait(self) -> None:
        id_, channel = self.some(self.town.ids), self.name
        if self.dice.random() < 0.3:
            call: Any = operations.forget(KEYS, id_, channel)
            call.decode = lambda _: None
            self.run(f"forget {id_}", call, lambda world: world.model.forget(id_, channel))
        else:
            call = operations.await_result(KEYS, id_, channel)
            call.decode = lambda reply: reply[0].decode()
            self.run(f"wait for {id_}", call, lambda world: world.model.wait(id_, channel))


def meet(client: Any, url: str, seed: int, steps: int) -> list[tuple[str, Step, Any]]:
    """Let four clients live on an emptied server; return (client, step, answer) in the server's order."""
    client.flushall()
    for script in vars(operations).values():
        if isinstance(script, Script) and script.name.islower():
            client.script_load(script.text)  # so that each step is one command
    seconds, micros = client.time()
    town = Town(seconds * 1000 + micros // 1000)
    clients = [SimulatedClient(url, town, name, f"{seed} {name}") for name in ("a", "b", "c", "d")]
    with client.monitor() as monitor:
        threads = [threading.Thread(target=one.live, args=(steps,)) for one in clients]
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
    world = World()
    for place, (name, step, reply) in enumerate(history):
        try:
            step.check(world, reply)
        except AssertionError as error:
            lines = [f"{one} {what.name}: {said!r}" for one, what, said in history[max(0, place - 40) : place + 1]]
            raise AssertionError("\n".join([*lines, f"step {place} of {name}: {error}"])) from error
    return world.model
