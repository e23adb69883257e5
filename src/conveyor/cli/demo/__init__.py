"""`conveyor demo`: real work through a real server, a worker killed on the way, and the accounts of it."""
