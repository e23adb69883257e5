"""One queue in four partitions: messages of a customer stay together, and one loop takes from all of them."""

from collections import Counter

from conveyor import Conveyor

app = Conveyor()
orders = app.queue("orders-of-many", partitions=4)

customers = [f"c{number}" for number in range(12)]
places: dict[str, set[str]] = {}
for number in range(36):
    customer = customers[number % 12]
    message_id = orders.push({"customer": customer, "number": number}, group=customer)
    places.setdefault(customer, set()).add(message_id.split(":")[0])
print("each customer in one partition:", all(len(found) == 1 for found in places.values()))
print("partitions used:", len(set.union(*places.values())))

last: dict[str, int] = {}
taken: Counter[str] = Counter()
for message in orders.consume(prefetch=8):
    with message as order:
        assert order["number"] > last.get(order["customer"], -1), "out of order"
        last[order["customer"]] = order["number"]
        taken[order["customer"]] += 1
    if sum(taken.values()) == 36:
        break
print("taken in order:", sum(taken.values()), "left:", len(orders))
app.close()
