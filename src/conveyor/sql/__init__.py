"""Jobs and the program's own database: enqueue in its transactions, and effects in it that happen once."""

from conveyor.sql.ledger import Ledger
from conveyor.sql.outbox import Outbox

__all__ = ["Ledger", "Outbox"]
