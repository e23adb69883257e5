"""Runs jobs: a supervisor, its child processes, and what runs inside them. asyncio only."""
