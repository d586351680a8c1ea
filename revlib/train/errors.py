"""What can go wrong in a training run, each with a text of one line."""

import signal
from pathlib import Path


class InputError(ValueError):
    """Something the caller gave cannot be used.

    Args:
        argument: What was given: the name of a setting, or a place in the data.
        rule: What it has to meet.
        value: What it is instead.

    Example:
        >>> print(InputError("epochs", "must be at least 1", 0))
        epochs must be at least 1; got 0
    """

    def __init__(self, argument: str, rule: str, value: object) -> None:
        got = "" if value is True else f"; got {value}"  # a flag was given, or it was not
        super().__init__(f"{argument} {rule}{got}")
        self.argument = argument
        self.rule = rule
        self.value = value


class CheckpointError(RuntimeError):
    """A checkpoint is missing or damaged. Nothing was written."""


class NonFiniteError(ArithmeticError):
    """The loss or a weight became infinite or NaN. No such weight was written.

    Args:
        what: Which of them, and when.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; lower --lr, and use another --out")


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop, and it stopped with a checkpoint in `latest`.

    Args:
        signal_number: Which signal it was.
        out: The folder of the run.
    """

    def __init__(self, signal_number: int, out: Path) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(f"stopped by {name}; --resume goes on from {out / 'latest'}")
        self.signal_number = signal_number


def first_line(error: Exception) -> str:
    """Says in one line what another library raised."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
