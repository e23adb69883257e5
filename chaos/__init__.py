"""Proof under faults: programs that use Conveyor, a nemesis that breaks things, and a checker that counts."""
