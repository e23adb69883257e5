"""Back-pressure: three fast producers and a slow consumer share a queue of five; the producers wait, and nothing is lost."""

import threading
import time

from conveyor import Conveyor

app = Conveyor()
frames = app.queue("frames", max_length=5, full="block")
most = 0


def produce(camera: int) -> None:
    """Push ten frames, as fast as the queue takes them."""
    for number in range(10):
        frames.push({"camera": camera, "number": number})


producers = [threading.Thread(target=produce, args=(camera,)) for camera in range(3)]
for producer in producers:
    producer.start()

seen: dict[int, list[int]] = {}
for message in frames.consume():
    with message as frame:
        time.sleep(0.005)
        seen.setdefault(frame["camera"], []).append(frame["number"])
    counts = frames.stats()
    most = max(most, len(counts) + counts.leased)
    if sum(map(len, seen.values())) == 30:
        break
for producer in producers:
    producer.join()

print("never more than five:", most <= 5)
print("each camera in order:", all(numbers == list(range(10)) for numbers in seen.values()))
app.close()
