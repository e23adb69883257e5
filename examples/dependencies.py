"""A job's dependencies: each is opened for it, closed after it, and replaced in a test. python dependencies.py"""

import asyncio
from collections.abc import AsyncIterator

from conveyor import Conveyor, Depends

app = Conveyor()
Names = dict[int, str]


async def pool() -> AsyncIterator[Names]:
    print("pool opened")  # once in a worker process
    yield {1: "Ada", 2: "Bob"}
    print("pool closed")


async def database(names: Names = Depends(pool, scope="worker")) -> AsyncIterator[Names]:
    print("connection opened")  # once a job
    yield names
    print("connection closed")


@app.task
async def greet(user: int, names: Names = Depends(database)) -> str:
    return f"Hello {names[user]}."


async def main() -> None:
    async with app:
        async with app.worker():
            for user in (1, 2):
                print(await (await greet.aenqueue(user)).aresult(timeout="1m"))
        async with app.worker():
            with app.override(database, lambda: {1: "Test"}):
                print(await (await greet.aenqueue(1)).aresult(timeout="1m"))


asyncio.run(main())
