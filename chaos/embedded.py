"""A program with a worker of its own inside, which also consumes messages in two ways; nobody supervises it."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from contextlib import suppress

from chaos.program import app, mail, noted
from conveyor import ConveyorError


async def read_mail() -> None:
    """Consume messages for ever; a body says how long its reader takes."""
    async for message in mail.aconsume(prefetch=5):
        async with message as body:
            with noted(body["token"], message.id, message.attempt):
                await asyncio.sleep(body["ms"] / 1000)


def pull_mail(stopped: threading.Event) -> None:
    """Pull messages until told to stop."""
    while not stopped.is_set():
        with suppress(ConveyorError):
            for message in mail.pull(n=3, wait=0.3):
                with message as body, noted(body["token"], message.id, message.attempt):
                    time.sleep(body["ms"] / 1000)
            continue
        time.sleep(0.1)


async def main() -> None:
    """Work until SIGTERM."""
    asked, stopped = asyncio.Event(), threading.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    puller = threading.Thread(target=pull_mail, args=(stopped,), daemon=True)
    async with app.worker(concurrency=50, threads=4, grace="2s"):
        reader = asyncio.create_task(read_mail())
        puller.start()
        await asked.wait()
        stopped.set()
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await asyncio.to_thread(puller.join, 5)


if __name__ == "__main__":
    asyncio.run(main())
