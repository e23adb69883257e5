"""Limits of time in tests: "at once" is before the next periodic look, which comes after five seconds at the earliest."""

AT_ONCE = 2.5
"""Seconds. A loaded machine wakes a process late; whoever looked by the clock instead would take twice that."""
