"""An argument of another type is refused."""

from conveyor import Conveyor

app = Conveyor("redis://127.0.0.1:6379/0")


@app.task
async def add(a: int, b: int = 2) -> int:
    return a + b


add.enqueue(1, "two")  # refused
