"""Conveyor: queues for Python on Redis and Valkey."""
