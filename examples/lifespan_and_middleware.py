"""Shared resources and code around every job. python lifespan_and_middleware.py"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from conveyor import CallNext, Context, Conveyor, Middleware, Outgoing, current

app = Conveyor()


@app.lifespan
async def database() -> AsyncIterator[dict[str, Any]]:
    print("opened")
    yield {"names": {1: "Ada", 2: "Bob"}}
    print("closed")


@app.middleware
class Trace(Middleware):
    def push(self, outgoing: Outgoing) -> None:  # in the producer
        outgoing.headers["trace"] = f"t{outgoing.args[0]}"

    async def run(self, context: Context, call_next: CallNext) -> Any:  # in the worker
        print(context.task, context.headers["trace"])
        return await call_next()


@app.task(name="name")
async def name(user: int, context: Context = current()) -> str:
    return str(context.state["names"][user])


async def main() -> None:
    async with app, app.worker():
        print(await (await name.aenqueue(1)).aresult(timeout="1m"))


if __name__ == "__main__":
    asyncio.run(main())
