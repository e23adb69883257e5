"""A call as a value is checked when it is written."""

from conveyor import Conveyor

app = Conveyor("redis://127.0.0.1:6379/0")


@app.task
async def add(a: int, b: int = 2) -> int:
    return a + b


app.enqueue_many([add.s("one")])  # refused
