"""Background jobs in one program: a task, a worker inside this program, results. python jobs_quickstart.py"""

import asyncio

from conveyor import Conveyor

app = Conveyor()  # CONVEYOR_URL, or an embedded server


@app.task
def add(a: int, b: int) -> int:
    return a + b


@app.task
async def greet(name: str) -> str:
    await asyncio.sleep(0.01)
    return f"Hello {name}."


async def main() -> None:
    async with app, app.worker():  # elsewhere: conveyor worker jobs_quickstart:app
        job = await greet.aenqueue("Ada")
        print(job.id, await job.aresult(timeout="1m"))
        jobs = await app.aenqueue_many(add.s(n, n) for n in range(1000))
        print(sum([await one.aresult(timeout="1m") for one in jobs]))


if __name__ == "__main__":
    asyncio.run(main())
