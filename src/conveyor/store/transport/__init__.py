"""The transport of calls: URLs, connections, topologies, error replies, wake-ups."""
