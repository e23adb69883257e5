"""A list of items is refused where one is enqueued."""

from conveyor import Conveyor

app = Conveyor("redis://127.0.0.1:6379/0")


@app.batch_task(size=10, within="1s")
async def index(rows: list[int]) -> None: ...


index.enqueue([1, 2])  # refused
