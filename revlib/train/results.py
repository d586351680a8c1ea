"""What a training run tells: of each epoch, while it runs, and at its end.

Each of the three comes in two forms: of a classifier, and of a flow (`Density...`).
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revlib.train.durable import write_bytes


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


@dataclass(frozen=True, kw_only=True)
class DensityEpoch:
    """One line of `metrics.jsonl` of a flow.

    Args:
        train_nll: The negative log-likelihood in nats, the mean over the samples of the epoch.
        train_bits_per_dim: The same in bits per pixel and channel; None for vectors.
        test_nll: That of held-out samples, after the epoch.
        test_bits_per_dim: Likewise.
        peak_activation_mib: The peak activations of a training step in MiB.
    """

    epoch: int
    step: int
    lr: float
    train_nll: float
    train_bits_per_dim: float | None = None
    test_nll: float
    test_bits_per_dim: float | None = None
    peak_activation_mib: float


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

    def line(self) -> str:
        """Says where it stands."""
        return (
            f"loss {self.loss:.4f} accuracy {self.accuracy:.1%} "
            f"{self.images_per_second:,.0f} images/s"
        )

    def epoch_line(self) -> str:
        """Says what the latest epoch has come to."""
        epoch = self.history[-1]
        return (
            f"train loss {epoch.train_loss:.4f} accuracy {epoch.train_accuracy:.1%}"
            f"  test loss {epoch.test_loss:.4f} accuracy {epoch.test_accuracy:.1%}"
        )


@dataclass(frozen=True, kw_only=True)
class DensityProgress:
    """Where the run of a flow stands.

    Args:
        step: Optimizer steps taken, of `steps`.
        nll: The negative log-likelihood in nats, the mean over the epoch so far, as last read.
        bits_per_dim: The same in bits per pixel and channel; None for vectors.
        samples_per_second: In training steps, over the whole run.
        peak_activation_mib: The peak activations of a training step in MiB.
        history: The epochs that are complete.
    """

    step: int
    steps: int
    nll: float
    bits_per_dim: float | None = None
    samples_per_second: float
    peak_activation_mib: float
    history: Sequence[DensityEpoch]

    def line(self) -> str:
        """Says where it stands."""
        figure = self.nll if self.bits_per_dim is None else self.bits_per_dim
        return f"{figure:.4f} {self._unit()} {self._cost()}"

    def epoch_line(self) -> str:
        """Says what the latest epoch has come to."""
        epoch = self.history[-1]
        train, test = epoch.train_nll, epoch.test_nll
        if epoch.test_bits_per_dim is not None:
            train, test = epoch.train_bits_per_dim, epoch.test_bits_per_dim
        return f"train {train:.4f}  test {test:.4f} {self._unit()}  {self._cost()}"

    def _unit(self) -> str:
        return "nats" if self.bits_per_dim is None else "bits/dim"

    def _cost(self) -> str:
        speed = f"{self.samples_per_second:,.0f} samples/s"
        return f"{speed} {self.peak_activation_mib:,.2f} MiB"


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

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yields the names and values that a table shows."""
        yield "parameters", f"{self.parameters:,}"
        yield "test accuracy", f"{self.test_accuracy:.2%}"
        yield "test loss", f"{self.test_loss:.4f}"
        yield "train accuracy", f"{self.train_accuracy:.2%}"
        yield "train loss", f"{self.train_loss:.4f}"
        yield "epochs (steps)", f"{self.epochs} ({self.steps:,})"
        yield "images/s in training", f"{self.images_per_second:,.0f}"


@dataclass(frozen=True, kw_only=True)
class DensityResult:
    """What the run of a flow has reached; `summary.json` holds the same.

    Args:
        test_bits_per_dim: Of held-out images; None for vectors, as is `train_bits_per_dim`.
        test_nll: The same in nats per sample, for vectors too.
        parameters: Their number in the flow.
        seconds: As for `Result`, and so are `settings` and `device`.
        peak_activation_mib: The peak activations of a training step in MiB.
    """

    test_bits_per_dim: float | None = None
    test_nll: float
    train_bits_per_dim: float | None = None
    train_nll: float
    parameters: int
    epochs: int
    steps: int
    seconds: float
    samples_per_second: float
    peak_activation_mib: float
    settings: dict[str, object]
    device: str
    torch: str

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yields the names and values that a table shows."""
        yield "parameters", f"{self.parameters:,}"
        if self.test_bits_per_dim is not None:
            yield "test bits/dim", f"{self.test_bits_per_dim:.4f}"
            yield "train bits/dim", f"{self.train_bits_per_dim:.4f}"
        yield "test nats", f"{self.test_nll:.4f}"
        yield "train nats", f"{self.train_nll:.4f}"
        yield "epochs (steps)", f"{self.epochs} ({self.steps:,})"
        yield "samples/s in training", f"{self.samples_per_second:,.0f}"
        yield "peak activations", f"{self.peak_activation_mib:,.2f} MiB"


AnyEpoch = Epoch | DensityEpoch
AnyProgress = Progress | DensityProgress
AnyResult = Result | DensityResult


def as_record(dataclass: Any) -> dict[str, object]:
    """Returns what a file holds of a dataclass: a figure that does not apply is left out."""
    record = dataclasses.asdict(dataclass)
    return {name: value for name, value in record.items() if value is not None}


def write_metrics(out: Path, history: Sequence[AnyEpoch]) -> None:
    """Writes `metrics.jsonl` anew: a resumed run then needs to know nothing of the old file."""
    lines = [json.dumps(as_record(epoch)) + "\n" for epoch in history]
    write_bytes(out / "metrics.jsonl", "".join(lines).encode())


def write_summary(out: Path, result: AnyResult) -> None:
    """Writes `summary.json`."""
    write_bytes(out / "summary.json", (json.dumps(as_record(result), indent=2) + "\n").encode())
