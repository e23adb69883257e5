"""The requirements of jobs on a worker: its labels, and the build that enqueued them."""

from __future__ import annotations

from collections.abc import Collection

from conveyor.errors import ConveyorError
from conveyor.payload.records import EnvelopeOptions


class RequirementUnmet(ConveyorError):
    """The job needs a label, or a build, that this worker does not have. It waits for one that has it, and uses no attempt."""

    code = "E57"

    def __init__(self, message: str, needs: str) -> None:
        super().__init__(message)
        self.needs = needs
        """The needs of the job, as lib/requirements.lua reads them."""


def unmet(extra: EnvelopeOptions, labels: Collection[str], build: str) -> RequirementUnmet | None:
    """Return why a job cannot run on a worker with these *labels* and that *build*; None: it can."""
    missing = [label for label in extra.requires if label not in labels]
    if missing:
        has = f"has {', '.join(sorted(labels))}" if labels else "has none"
        return RequirementUnmet(
            f"It requires a worker with the label {', '.join(missing)}; this one {has}.", _needs(extra)
        )
    if extra.pin and extra.pin != build:
        return RequirementUnmet(
            f"It is pinned to build {extra.pin!r}; this worker is {f'of {build!r}' if build else 'of none'}.",
            _needs(extra),
        )
    return None


def _needs(extra: EnvelopeOptions) -> str:
    """Return what a job with these options needs of a worker, as lib/requirements.lua reads it."""
    return "\n".join([*(f"l{label}" for label in sorted(extra.requires)), *([f"b{extra.pin}"] if extra.pin else [])])
