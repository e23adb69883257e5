"""The tables of outbox and ledger: their names, and the SQL that creates them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from conveyor.errors import ConfigurationError
from conveyor.sql.drivers import adapt_async, adapt_blocking

if TYPE_CHECKING:
    from conveyor.sql.drivers import AsyncDbConnection, DbConnection


DIALECTS = ("sqlite", "postgresql", "mysql")
_TYPES = {
    "sqlite": {"SERIAL": "INTEGER PRIMARY KEY AUTOINCREMENT", "BYTES": "BLOB"},
    "postgresql": {"SERIAL": "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY", "BYTES": "BYTEA"},
    "mysql": {"SERIAL": "BIGINT AUTO_INCREMENT PRIMARY KEY", "BYTES": "LONGBLOB"},
}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,47}(\.[A-Za-z_][A-Za-z0-9_]{0,47})?")
OUTBOX = """CREATE TABLE IF NOT EXISTS {table} (
  seq SERIAL,
  namespace VARCHAR(64) NOT NULL,
  batch VARCHAR(32) NOT NULL DEFAULT '',
  queue VARCHAR(512) NOT NULL,
  created_ms BIGINT NOT NULL,
  entry BYTES NOT NULL
)
CREATE INDEX IF NOT EXISTS {index} ON {table} (namespace, batch, seq)"""
LEDGER = """CREATE TABLE IF NOT EXISTS {table} (
  id VARCHAR(255) NOT NULL PRIMARY KEY,
  created_ms BIGINT NOT NULL,
  result BYTES
)
CREATE INDEX IF NOT EXISTS {index} ON {table} (created_ms)"""


class TableSql:
    """The SQL of one table: its DDL, and statements with its name filled in."""

    def __init__(self, name: str, ddl: str, kind: str) -> None:
        """
        Check the name, ``table`` or ``schema.table``; raises ConfigurationError.

        *ddl* creates the table, *kind* is the word for it in error messages.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"Invalid table name {name!r}: use letters, digits and _, with a schema in front if needed."
            )
        self.name = name
        self.kind = kind
        self._ddl = ddl

    def __str__(self) -> str:
        return self.name

    def ddl(self, dialect: str) -> list[str]:
        """Return the statements that create the table. Raises ConfigurationError for an unknown dialect."""
        if dialect not in _TYPES:
            raise ConfigurationError(f"There is SQL for {', '.join(DIALECTS)}, not for {dialect!r}.")
        text = self._ddl
        if dialect == "mysql":  # it has no CREATE INDEX IF NOT EXISTS, and compares a and A as equal by default
            text = re.sub(
                r"\n\)\nCREATE INDEX IF NOT EXISTS {index} ON {table} (.*)",
                r",\n  INDEX {index} \1\n) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin",
                text,
            )
        text = self.fill(text).replace("{index}", f"{self.name.rpartition('.')[2]}_index")
        for word, type_ in _TYPES[dialect].items():
            text = re.sub(rf"\b{word}\b", type_, text)
        return re.split(r"\n(?=CREATE INDEX)", text)

    def script(self, dialect: str) -> str:
        """Return the statements as one text."""
        return "".join(f"{statement};\n" for statement in self.ddl(dialect))

    def create(self, db: DbConnection) -> None:
        """Create the table where it does not exist, and commit."""
        for statement in self.ddl(db.dialect):
            db.run(statement)
        db.commit()

    async def acreate(self, db: AsyncDbConnection) -> None:
        """Awaitable form of `create`."""
        for statement in self.ddl(db.dialect):
            await db.run(statement)
        await db.commit()

    def fill(self, sql: str) -> str:
        """Return *sql* with the name of the table."""
        return sql.replace("{table}", self.name)


class ManagedTable:
    """The common part of outbox and ledger: a table that the program creates."""

    def __init__(self, table: TableSql) -> None:
        self._table = table

    def ddl(self, dialect: str) -> str:
        """Return the SQL that creates the table in sqlite, postgresql or mysql. Raises ConfigurationError for others."""
        return self._table.script(dialect)

    def create(self, connection: Any) -> None:
        """Create the table where it does not exist, and commit. Raises ConfigurationError for an unknown database."""
        self._table.create(adapt_blocking(connection))

    async def acreate(self, connection: Any) -> None:
        """Awaitable form of `create`."""
        await self._table.acreate(adapt_async(connection))
