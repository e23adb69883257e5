"""Calls that are the same work: one run for many changes, and a run more for what changed meanwhile. python unique_jobs.py"""

import asyncio

from conveyor import Conveyor, Debounce, Unique

app = Conveyor()
started, go = asyncio.Event(), asyncio.Event()


@app.task(debounce=Debounce("1s", by="page", max_wait="10s"))
async def publish(page: str, version: int) -> str:
    return f"published {page} {version}"


@app.task(unique=Unique(by=("page",), conflict="rerun"))
async def index(page: str, version: int) -> str:
    started.set()
    await go.wait()
    return f"indexed {page} {version}"


async def main() -> None:
    async with app, app.worker():
        edits = [await publish.aenqueue("home", version) for version in range(1, 6)]
        print(len({job.id for job in edits}), "job,", await edits[0].aresult(timeout="1m"))

        first = await index.aenqueue("home", 1)
        await started.wait()
        later = [await index.aenqueue("home", version) for version in range(2, 6)]
        print(later[-1].conflict, len({job.id for job in later}))
        go.set()
        print(await first.aresult(timeout="1m"), "then", await later[0].aresult(timeout="1m"))


if __name__ == "__main__":
    asyncio.run(main())
