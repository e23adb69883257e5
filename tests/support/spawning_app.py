"""The app of test_spawn_delivery_kills.py: parents spawn followers, which write down who they are."""

from __future__ import annotations

import asyncio
import os
import random

from conveyor import Context, Conveyor, Retry, current

app = Conveyor(namespace="family", lease="2s")


@app.task(queue="followers", keep_result=0)
async def follower(n: int, context: Context = current()) -> None:
    with open(os.environ["FAMILY_LOG"], "a") as log:
        log.write(f"{n} {context.job_id}\n")


@app.task(queue="parents", keep_result=0, retry=Retry(attempts=9, backoff="1ms", max_crashes=1000))
async def parent(n: int, context: Context = current()) -> None:
    context.spawn(follower.s(n))
    await asyncio.sleep(random.uniform(0, 0.01))
    if n % 7 == 0 and context.attempt == 1:
        raise ValueError("fails after it has spawned")


@app.task(queue="parents", keep_result=0, run_in="process")
def distant(n: int) -> None:
    current().spawn(follower.s(n))
