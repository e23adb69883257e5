"""An argument that the function does not have is refused, behind options too."""

from conveyor import Conveyor

app = Conveyor("redis://127.0.0.1:6379/0")


@app.task
async def add(a: int, b: int = 2) -> int:
    return a + b


add.options(delay="5s").enqueue(1, c=3)  # refused
