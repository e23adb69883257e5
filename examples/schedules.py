"""Work at planned instants, declared in code and put as data. python schedules.py"""

import asyncio
from datetime import datetime, timedelta

from conveyor import Conveyor, current

app = Conveyor()
beats: asyncio.Queue[datetime] = asyncio.Queue()


@app.cron(every="1s", overlap="queue")
@app.task(queue="beats")
async def beat() -> None:
    instant = current().scheduled_for
    assert instant is not None
    beats.put_nowait(instant)


@app.task(queue="beats")
async def remind(name: str) -> None:
    print(f"remember, {name}")


async def main() -> None:
    async with app, app.worker():
        reminder = await app.schedules.aput("remind-ada", remind.s("Ada"), cron="30 8 * * mon", tz="Europe/Berlin")
        print(reminder.when)
        print("Mondays:", {instant.weekday() for instant in reminder.next(5)} == {0})
        await (await reminder.arun()).aresult(timeout="1m")  # now, beside its instants
        first, second = await beats.get(), await beats.get()
        print("two beats, a second apart:", second - first == timedelta(seconds=1))
        for schedule in await app.schedules.alist():
            await schedule.adelete()


asyncio.run(main())
