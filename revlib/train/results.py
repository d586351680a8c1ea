"""What a training run tells: of each epoch, while it runs, and at its end."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from revlib.train.durable import write_text


@dataclass(frozen=True)
class Epoch:
    """One line of `metrics.jsonl`; no times, so that a resumed run repeats it bitwise."""

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Args:
        step: Optimizer steps taken, of `steps`.
        loss: The mean over the epoch so far, as last read.
        accuracy: Likewise, between 0 and 1.
        images_per_second: In training steps, over the whole run.
        history: The epochs that are complete.
    """

    step: int
    steps: int
    loss: float
    accuracy: float
    images_per_second: float
    history: Sequence[Epoch]


@dataclass(frozen=True)
class Result:
    """What a run has reached; `summary.json` holds the same.

    Args:
        parameters: Their number in the model.
        seconds: The time that the training steps took, in all processes that did some in turn.
        settings: The settings that decide the result, with a checksum in place of `data`.
        device: What it ran on.
    """

    test_accuracy: float
    test_loss: float
    train_accuracy: float
    train_loss: float
    parameters: int
    epochs: int
    steps: int
    seconds: float
    images_per_second: float
    settings: dict[str, object]
    device: str
    torch: str


def write_metrics(out: Path, history: Sequence[Epoch]) -> None:
    """Writes `metrics.jsonl` anew: a resumed run then needs to know nothing of the old file."""
    lines = [json.dumps(dataclasses.asdict(epoch)) + "\n" for epoch in history]
    write_text(out / "metrics.jsonl", "".join(lines))


def write_summary(out: Path, result: Result) -> None:
    """Writes `summary.json`."""
    write_text(out / "summary.json", json.dumps(dataclasses.asdict(result), indent=2) + "\n")
