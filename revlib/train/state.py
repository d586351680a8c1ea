"""What a checkpoint holds, and how it gets there and back.

Accelerate writes and reads the model, the optimizer and the gradient scaler. `run.json`
beside them holds the rest: the settings that decide the result, and how far the run is.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from revlib.train import checkpoint
from revlib.train.errors import CheckpointError, InputError, first_line
from revlib.train.results import AnyEpoch, as_record

FILE = "run.json"


@dataclass
class State:
    """How far a run is.

    Args:
        step: Optimizer steps taken.
        seconds: The time they took.
        totals: Of the epoch so far, for each process: the sum of losses, and what else is counted.
        history: The epochs that are complete.
        peak_activation_bytes: Of a training step, once it has been measured.
    """

    step: int = 0
    seconds: float = 0.0
    totals: list[list[float]] = field(default_factory=list)
    history: list[AnyEpoch] = field(default_factory=list)
    peak_activation_bytes: int | None = None


def save(accelerator: Accelerator, out: Path, settings: dict[str, Any], state: State) -> None:
    """Writes a checkpoint; every process has to call it."""
    partial = checkpoint.partial_path(out, state.step)
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)  # A kill may have left one half written.
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(partial)
    # On a full disk, each library that writes a part of it raises an error of its own.
    except Exception as error:
        message = f"{partial} could not be written; is the disk full? ({first_line(error)})"
        raise OSError(message) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        record = {"settings": settings, **as_record(state)}
        (partial / FILE).write_text(json.dumps(record, indent=2))
        checkpoint.publish(partial)


def load(
    accelerator: Accelerator, out: Path, settings: dict[str, Any], epoch: type[AnyEpoch]
) -> State:
    """Reads the latest checkpoint, with its figures as `epoch`; every process has to call it."""
    path = checkpoint.latest(out)
    record = json.loads((path / FILE).read_text())
    # The data last: another model may take other data, and is then what has to be named.
    for name, value in sorted(record.pop("settings").items(), key=lambda item: item[0] == "data"):
        if settings.get(name) == value:
            continue
        if name == "data":  # Two checksums would tell nobody anything.
            raise InputError(name, f"must be the same as in the run in {out}", "others")
        rule = f"must stay {value}, as in the run in {out}"
        raise InputError(name, rule, settings.get(name))
    try:
        accelerator.load_state(path)
    except (RuntimeError, ValueError) as error:
        message = f"{path} was written for another model ({first_line(error)})"
        raise CheckpointError(message) from error
    record["history"] = [epoch(**figures) for figures in record["history"]]
    return State(**record)
