"""Jobs and a program's own database: enqueued in its transactions, and effects there that happen once."""

from conveyor.sql.ledger import Ledger
from conveyor.sql.outbox import Outbox

__all__ = ["Ledger", "Outbox"]
