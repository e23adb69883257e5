"""Queues of messages: pushing, consuming, settling. Knows no task."""
