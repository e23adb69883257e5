"""An app's way into Redis: calls, pushes, batching, confirmation, buffering."""
