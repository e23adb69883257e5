"""
A child process with a minimal worker; everything of `conveyor.worker.supervision.child_main` around it is real.

As a program it is both: with JSON as its only argument a supervisor, otherwise the child which that starts. A message's
task says what happens: `hold` (until told to stop), `sleep` (for so many seconds), `block` (the loop stands still until
the file of that name exists), `clutch` (so does every thread), `recycle`, `exit` (the process ends with that code), `noop`.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import sys
import time

from conveyor.ids import new_identity
from conveyor.payload.records import read_envelope, to_json
from conveyor.store import operations
from conveyor.store.client.client import Client
from conveyor.store.keys import QueueKeys
from conveyor.store.operations import Settlement, TurnReport
from conveyor.worker.crash_attribution import id_checksum
from conveyor.worker.logs import configure_log
from conveyor.worker.shared_memory import ChildInfo, ChildSlot, ChildSpec
from conveyor.worker.supervision import child_main
from conveyor.worker.supervision.supervisor import Supervisor

URL, LEASE_MS = os.environ.get("STUB_URL", ""), int(os.environ.get("STUB_LEASE_MS", "1000"))
WANT = int(os.environ.get("STUB_WANT", "20"))


class StubWorker:
    """Leases up to WANT jobs of one queue, and runs them all at once."""

    login = None

    def __init__(self, spec: ChildSpec, slot: ChildSlot, url: str) -> None:
        self.spec, self.slot = spec, slot
        self.client = Client(url, namespace="test")
        self.keys = QueueKeys("test", next(iter(spec.queues)))
        self.worker = new_identity()
        self.running: dict[str, asyncio.Task[None]] = {}
        self.done: list[str] = []
        self.stops = 0
        self.is_quiet = False
        self.number = 0
        self.table = slot.running_table()

    def stop(self) -> None:
        self.stops += 1

    def hurry(self) -> None:
        self.stops += 2

    def quiet(self) -> None:
        self.is_quiet = True

    async def run(self) -> int:
        ticking = asyncio.create_task(self.tick())
        self.slot.set_identity(self.keys, self.worker, LEASE_MS)
        about = to_json({"pid": os.getpid(), "group": os.getpgid(0)})
        await self.client.arun(operations.register(self.keys, self.worker, LEASE_MS, about), retry_for=60)
        deadline = None
        while True:
            if self.stops and deadline is None:
                deadline = time.monotonic() + self.spec.grace
            over = self.stops > 1 or (deadline is not None and time.monotonic() > deadline)
            give_back = [
                Settlement("F", id_) for id_, task in self.running.items() if over or (self.stops and is_held(task))
            ]
            await self.turn(0 if self.stops or self.is_quiet else WANT - len(self.running), give_back)
            if not self.running and not self.done and (self.stops or (self.spec.burst and await self.drained())):
                ticking.cancel()
                return 0
            await asyncio.sleep(0.02)

    async def turn(self, want: int, give_back: list[Settlement]) -> None:
        report = TurnReport(done=self.done, others=give_back)
        self.done, self.number = [], self.number + 1
        call = operations.turn(
            self.keys, self.worker, self.number, want, LEASE_MS, report, flags="t" if self.stops else ""
        )
        turn = await self.client.arun(call, retry_for=60)
        self.slot.note_renewal(self.worker)
        assert turn.lost == []
        for one in give_back:
            self.running.pop(one.id).cancel()
        for id_, data in zip(turn.ids, turn.envelopes, strict=True):
            envelope = read_envelope(data)
            self.running[id_] = asyncio.create_task(self.work(id_, envelope.task, envelope.body), name=envelope.task)

    async def work(self, id_: str, task: str, body: bytes) -> None:
        self.slot.set_job(task, id_)
        cell = self.table.take_cell()
        self.table.cells[cell] = id_checksum(id_)
        if task == "block":
            while not os.path.exists(body):
                time.sleep(0.05)
        elif task == "clutch":
            while not os.path.exists(body):
                ctypes.PyDLL(None).usleep(300_000)  # called without letting go of the GIL
        elif task == "sleep":
            await asyncio.sleep(float(body))
        elif task == "recycle":
            self.slot.finish()
            asyncio.get_running_loop().call_later(0.05, child_main._exit, child_main.RECYCLE)
        elif task == "exit":
            os._exit(int(body))
        elif task == "hold":
            await asyncio.Event().wait()
        self.slot.clear_job()
        self.table.release_cell(cell)
        del self.running[id_]
        self.done.append(id_)

    async def drained(self) -> bool:
        return await self.client.aexecute("HLEN", self.keys.jobs, key=self.keys.jobs) == 0

    async def tick(self) -> None:
        while True:
            self.slot.tick()
            await asyncio.sleep(0.05)


def is_held(task: asyncio.Task[None]) -> bool:
    return task.get_name() == "hold"


def start(spec: ChildSpec, slot: ChildSlot) -> tuple[ChildInfo, StubWorker]:
    if spec.app == "broken:app":
        raise ImportError("No module named 'broken'")
    url = URL
    if url.startswith("embedded:"):
        backend = Client(url, namespace="test")
        url = backend.address.url
        assert backend.server_handle is not None
        return ChildInfo(f"embedded:{backend.server_handle.directory}", "test"), StubWorker(spec, slot, url)
    return ChildInfo(url, "test", 1, ("hold",), tuple(spec.queues)), StubWorker(spec, slot, url)


def supervise(options: dict[str, object]) -> int:
    configure_log(verbose=True)
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    app, processes = str(options.pop("app", "support.stub_worker:app")), int(str(options.pop("processes", 1)))
    stall = float(str(options.pop("max_stall", 300)))
    fixed = {
        "queues": {"q": 1.0},
        "concurrency": 1,
        "threads": 1,
        "burst": False,
        "grace": 5.0,
        "path": tuple(sys.path),
    }
    spec = ChildSpec(app, **{**fixed, **options})  # type: ignore[arg-type]
    return Supervisor(spec, processes=processes, child_module="support.stub_worker", max_stall=stall).run()


if __name__ == "__main__":
    if len(sys.argv) == 2:
        sys.exit(supervise(json.loads(sys.argv[1])))
    child_main.main(start)
