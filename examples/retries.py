"""Failures: a task that comes back, one that gives up, one that asks to run later. python retries.py"""

import asyncio

from conveyor import Conveyor, JobFailed, Retry, Snooze, current

app = Conveyor()


@app.task(retry=Retry(attempts=4, backoff="20ms", give_up=(PermissionError,)))
async def call(user: str) -> str:
    if user == "eve":
        raise PermissionError("not for eve")
    if current().attempt < 3:
        raise ConnectionError("the other side is away")
    return f"{user} served at attempt {current().attempt}"


@app.task(retry=1)
async def patient() -> int:
    if current().attempt < 3:
        raise Snooze("20ms")  # uses no attempt of the budget
    return current().attempt


async def main() -> None:
    async with app, app.worker():
        print(await (await call.aenqueue("ada")).aresult(timeout="1m"))
        print("patient ran", await (await patient.aenqueue()).aresult(timeout="1m"), "times")
        try:
            await (await call.aenqueue("eve")).aresult(timeout="1m")
        except JobFailed as error:
            print(f"{error.type}: {error.message}")


if __name__ == "__main__":
    asyncio.run(main())
