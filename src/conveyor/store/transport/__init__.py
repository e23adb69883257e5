"""How a call travels: URLs, connections, topologies, error replies, wake-ups."""
