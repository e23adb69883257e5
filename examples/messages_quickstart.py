"""A queue of typed messages: push, consume, a failure that comes back. python messages_quickstart.py"""

from dataclasses import dataclass

from conveyor import Conveyor


@dataclass
class Order:
    id: str
    total: int


app = Conveyor()  # CONVEYOR_URL, or an embedded server
orders = app.queue("quickstart-orders", Order)

with app:
    orders.push_many(Order(f"o{n}", n) for n in range(1, 4))
    orders.push(Order("urgent", 100), priority=9)

    done = 0
    for message in orders.consume():
        with message as order:
            if order.id == "o2" and message.attempt == 1:
                raise ConnectionError("the till is away")  # logged; the message comes back after a pause
            print(order.id, order.total, "attempt", message.attempt)
            done += order.total
        if done == 106:
            break
