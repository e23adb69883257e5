"""The target of `multiprocessing` in the tests of forks; a module of its own, because `spawn` imports it anew."""

from __future__ import annotations

from conveyor import Conveyor


async def note(n: int) -> None: ...


def spawned(url: str, start: int) -> None:
    """Enqueue from a process of `multiprocessing`."""
    with Conveyor(url) as app:
        task = app.task(name="note")(note)
        for n in range(start, start + 20):
            task.enqueue(n)
