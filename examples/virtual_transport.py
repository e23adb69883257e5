"""A transport for messaging libraries such as kombu, on public names alone. python virtual_transport.py"""

from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

from conveyor import Conveyor, Message


class Channel:
    """Queues of one connection. What was received is held until it is acknowledged or rejected, or the channel closes."""

    def __init__(self, app: Conveyor) -> None:
        self.app, self.tags = app, count(1)
        self.callbacks: dict[str, Callable[[int, Any], None]] = {}  # of the queues that are consumed
        self.held: dict[int, Message[Any]] = {}  # by delivery tag

    def basic_publish(self, body: Any, queue: str, headers: dict[str, str] | None = None, priority: int = 0) -> str:
        return self.app.queue(queue).push(body, headers=headers, priority=priority)

    def basic_get(self, queue: str) -> tuple[int, Any] | None:
        return next(((tag, message.body) for tag, message in self._receive([queue], 1, 0)), None)

    def basic_consume(self, queue: str, callback: Callable[[int, Any], None]) -> None:
        self.callbacks[queue] = callback

    def basic_cancel(self, queue: str) -> None:
        self.callbacks.pop(queue)

    def drain_events(self, timeout: float = 20.0, prefetch: int = 1) -> None:
        """Wait for a message in any queue that is consumed, in one blocking call, and hand it to its callback."""
        received = self._receive(self.callbacks, prefetch, timeout)
        if not received:
            raise TimeoutError
        for tag, message in received:
            self.callbacks[message.queue](tag, message.body)

    def basic_ack(self, tag: int) -> None:
        self.held.pop(tag).ack()

    def basic_reject(self, tag: int, requeue: bool = False) -> None:
        message = self.held.pop(tag)
        message.release() if requeue else message.dead("rejected")

    def basic_recover(self) -> None:
        for tag in sorted(self.held, reverse=True):  # the last one first, so that they keep their order
            self.held.pop(tag).release()

    def queue_size(self, queue: str) -> int:
        return len(self.app.queue(queue))

    def queue_purge(self, queue: str) -> int:
        return self.app.queue(queue).purge()

    def queue_delete(self, queue: str) -> None:
        self.app.queue(queue).purge()
        self.app.queue(queue).purge(dead=True)
        self.app.queue(queue).delete()

    def close(self) -> None:
        self.callbacks.clear()
        self.basic_recover()

    def _receive(self, queues: Iterable[str], n: int, wait: float) -> list[tuple[int, Message[Any]]]:
        received = [(next(self.tags), message) for message in self.app.pull(list(queues), n, wait, renew=True)]
        self.held.update(received)
        return received


if __name__ == "__main__":
    channel = Channel(Conveyor())

    def receive(tag: int, body: Any) -> None:
        print("received", body)
        channel.basic_ack(tag)

    for queue in ("mail", "images"):
        channel.basic_publish(f"to {queue}", queue)
        channel.basic_consume(queue, receive)
    channel.drain_events(prefetch=2)
    channel.basic_publish("again", "mail")
    tag, _ = channel.basic_get("mail") or (0, "")
    channel.basic_reject(tag, requeue=True)
    print("waiting after the requeue:", channel.queue_size("mail"))
    print("purged:", channel.queue_purge("mail"))
    for queue in ("mail", "images"):
        channel.queue_delete(queue)
    channel.close()
