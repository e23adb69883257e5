"""A function of the library, whose type the checker knows."""

from conveyor.units import milliseconds

right: int = milliseconds("5s")
wrong: str = milliseconds("5s")  # refused
