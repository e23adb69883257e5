"""An option that does not exist is refused."""

from conveyor import Conveyor

app = Conveyor("redis://127.0.0.1:6379/0")


@app.task
async def add(a: int, b: int = 2) -> int:
    return a + b


add.options(prio=3)  # refused
