"""What an outbox and a ledger have in common: a table that somebody must create."""

from __future__ import annotations

from typing import Any

from conveyor.sql.link import awaitable, blocking
from conveyor.sql.table import Table


class Owner:
    """Owns a table."""

    def __init__(self, table: Table) -> None:
        """Take the table; nothing is created yet."""
        self._table = table

    def ddl(self, dialect: str) -> str:
        """Return the SQL that creates the table: for sqlite, postgresql or mysql. Raises ConfigurationError for another."""
        return self._table.script(dialect)

    def create(self, connection: Any) -> None:
        """Create the table where it does not exist, and commit. Raises ConfigurationError for an unknown database."""
        self._table.create(blocking(connection))

    async def acreate(self, connection: Any) -> None:
        """Create the table, as `create`, on a connection of asyncio."""
        await self._table.acreate(awaitable(connection))
