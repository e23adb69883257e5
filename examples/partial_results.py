"""Partial results: an answer that is read word by word while its job writes it."""

import asyncio

from conveyor import Conveyor, current

app = Conveyor()


@app.task
async def answer(question: str) -> int:
    """Write an answer, a word at a time."""
    words = f"You asked: {question}".split()
    for word in words:
        await current().emit(word)
        await asyncio.sleep(0.05)  # a model thinks
    return len(words)


async def main() -> None:
    """Read the answer in two pieces: the reader goes away after two words, and comes back."""
    async with app, app.worker():
        job = await answer.aenqueue("what is a queue?")
        last = ""
        async for part in job.astream():
            print(part.value, end=" ", flush=True)
            last = part.id
            if part.id == "1-2":
                break
        async for part in job.astream(after=last):
            print(part.value, end=" ", flush=True)
        print(f"({await job.aresult()} words)")


if __name__ == "__main__":
    asyncio.run(main())
