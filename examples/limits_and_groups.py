"""Limits and groups: a rate for all workers together, order within a key. python limits_and_groups.py"""

import asyncio
import time
from collections import Counter

from conveyor import Concurrency, Conveyor, Rate, current

app = Conveyor()
running: Counter[str] = Counter()
most: Counter[str] = Counter()
order: list[int] = []


@app.task(queue="api", limits=[Rate(20, "200ms"), Concurrency(2, by="tenant")])
async def call_api(tenant: str) -> None:
    running[tenant] += 1
    most[tenant] = max(most[tenant], running[tenant])
    await asyncio.sleep(0.002)
    running[tenant] -= 1


@app.task(queue="ledger", group_by="account")
async def book(account: str, number: int) -> None:
    if number == 1 and current().attempt == 1:
        raise ConnectionError("the retry blocks this account, and no other")
    order.append(number)


async def main() -> None:
    async with app, app.worker():
        began = time.monotonic()
        jobs = [await call_api.aenqueue(f"tenant{n % 3}") for n in range(60)]
        jobs += [await book.aenqueue("acme", number) for number in range(3)]
        await asyncio.gather(*[job.aresult(timeout="1m") for job in jobs])
        print("60 calls at 20 in 200 ms took long enough:", time.monotonic() - began > 0.39)
        print("at most", max(most.values()), "of a tenant at a time")
        print("booked in order:", order)


if __name__ == "__main__":
    asyncio.run(main())
