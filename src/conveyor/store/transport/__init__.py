"""The way of a call: URLs, connections, topologies, error replies, wake-ups."""
