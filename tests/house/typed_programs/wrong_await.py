"""A handle used before it was awaited is refused."""

from conveyor import Conveyor

app = Conveyor("redis://127.0.0.1:6379/0")


@app.task
async def add(a: int, b: int = 2) -> int:
    return a + b


async def main() -> str:
    return add.aenqueue(1).id  # refused
