"""A program with a worker of its own inside, which also consumes messages in two ways; nobody supervises it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any

from chaos.tested_app import app, copies, mail, noted, post
from conveyor import ConveyorError

QUEUES = os.environ["CHAOS_QUEUES"].split()


async def read(queue: Any) -> None:
    """Consume messages for ever; a body says how long its reader takes."""
    async for message in queue.aconsume(prefetch=5):
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
    async with app.worker(queues=dict.fromkeys(QUEUES, 1.0), concurrency=50, threads=4, grace="2s"):
        readers = [
            asyncio.create_task(read(queue))
            for queue in ([mail, post, *copies] if "wide" in QUEUES else [mail, *copies])
        ]
        puller.start()
        await asked.wait()
        stopped.set()
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        await asyncio.to_thread(puller.join, 5)


if __name__ == "__main__":
    asyncio.run(main())
