"""What a task says about one step of a completion."""

from typing import NamedTuple


class StepCheck(NamedTuple):
    """Whether a step is true; `kind` names what it should have said, `reason` what is wrong with it."""

    kind: str
    correct: bool
    reason: str
