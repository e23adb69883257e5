"""A parameter that does not have the type that its dependency yields is refused."""

from collections.abc import AsyncIterator

from conveyor import Conveyor, Depends

app = Conveyor("redis://127.0.0.1:6379/0")


class Db: ...


async def get_db() -> AsyncIterator[Db]:
    yield Db()


@app.task
async def work(x: int, db: str = Depends(get_db)) -> int:  # refused
    return x
