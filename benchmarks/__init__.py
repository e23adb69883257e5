"""Conveyor beside plain Redis lists, measured in one run on one server: `python -m benchmarks`."""
