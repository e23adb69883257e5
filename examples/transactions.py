"""Jobs in a database transaction: real with its commit, gone after a rollback; and an effect that happens once."""

import asyncio
import sqlite3
from contextlib import closing, suppress
from tempfile import mkdtemp

from conveyor import Context, Conveyor, current
from conveyor.sql import Ledger, Outbox

database = f"{mkdtemp()}/shop.db"
app, ledger = Conveyor(), Ledger()
outbox = Outbox(app, lambda: sqlite3.connect(database))


@app.task
def charge(order: str, context: Context = current()) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:  # commits at its end
        if ledger.first(connection, context.job_id):
            connection.execute("UPDATE orders SET charged = charged + 1 WHERE id = ?", (order,))
    if context.attempt == 1:
        raise ConnectionError("lost after the commit, so the job runs again")


async def main() -> None:
    async with app:
        with closing(sqlite3.connect(database)) as connection:
            outbox.create(connection)
            ledger.create(connection)
            connection.execute("CREATE TABLE orders (id TEXT PRIMARY KEY, charged INT DEFAULT 0)")
            for order in ("o1", "o1"):
                with suppress(sqlite3.IntegrityError):
                    async with outbox.transaction(connection):
                        await charge.aenqueue(order)
                        connection.execute("INSERT INTO orders (id) VALUES (?)", (order,))  # twice: rolled back
            print("delivered:", await outbox.adeliver())
            async with app.worker(burst=True) as worker:
                await worker.wait()
            print(connection.execute("SELECT id, charged FROM orders").fetchall())


asyncio.run(main())
