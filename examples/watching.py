"""A job that tells how far it is, and somebody who watches it. python watching.py"""

import asyncio

from conveyor import Conveyor, Retry, current
from conveyor.events import JobEnded, ProgressChanged, StateChanged

app = Conveyor()


@app.task(retry=Retry(attempts=3, backoff="10ms"))
async def resize(images: int) -> int:
    context = current()
    first = int(context.notes.get("done", 0))  # what an earlier attempt has done
    for number in range(first, images):
        if number == 3 and context.attempt == 1:
            raise OSError("the disk is full")
        await asyncio.sleep(0.05)
        context.notes["done"] = number + 1
        context.progress(number + 1, images, "resizing")
    return images - first


async def main() -> None:
    async with app, app.worker():
        job = await resize.aenqueue(6)
        async for update in job.awatch():
            match update:
                case StateChanged(state="leased"):
                    print(f"attempt {update.attempt} runs")
                case StateChanged(error=error) if error:
                    print(f"attempt {update.attempt - 1} failed: {error}")
                case ProgressChanged():
                    print(f"{update.done} of {update.total} {update.text}")
                case JobEnded():
                    print(update.state)
        print("resized by the last attempt:", await job.aresult())
        print("at the end:", await job.aprogress())
        print([entry.state for entry in await job.ahistory()])


asyncio.run(main())
