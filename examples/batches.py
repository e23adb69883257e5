"""Orders are enqueued one by one, and written together; one that fails is tried again without the others."""

import asyncio

from conveyor import BatchFailed, Context, Conveyor, Retry, current

app = Conveyor()
calls: list[int] = []


@app.batch_task(size=50, within="100ms", queue="rows", retry=Retry(attempts=3, backoff="10ms"))
async def write(rows: list[dict[str, int]], context: Context = current()) -> list[int]:
    calls.append(len(rows))
    results = [2 * row["n"] for row in rows]
    failed = {at: ValueError(row) for at, row in enumerate(rows) if row["n"] == 7 and context.items[at].attempt == 1}
    if failed:
        raise BatchFailed(failed, results=results)
    return results


async def main() -> None:
    async with app, app.worker(queues={"rows": 1}):
        jobs = await app.aenqueue_many(write.s({"n": n}) for n in range(120))
        results = [await job.aresult(timeout="1m") for job in jobs]
    print("all written:", results == [2 * n for n in range(120)])
    print("fewer than ten calls:", len(calls) < 10)


asyncio.run(main())
