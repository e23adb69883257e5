"""Consumers of a queue: steps without I/O, and the blocking and asyncio drivers that take them."""
