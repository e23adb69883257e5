"""Runs under faults: programs that use Conveyor, a fault injector, and a checker that counts what was lost or done twice."""
