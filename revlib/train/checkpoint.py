"""Checkpoints that are whole or not there, whenever the process dies.

A checkpoint is a folder. It is filled under a temporary name, every file in it and the
folder itself are fsynced, it is renamed, and only then does the link `latest` move to it,
in one step. The one before is kept; older ones go last. What has its final name is never
written again.

    runs/x/checkpoints/step-00000500/    model.safetensors, optimizer.bin, ..., SHA256SUMS
    runs/x/latest -> checkpoints/step-00000500

`sha256sum -c SHA256SUMS` checks one by hand.
"""

import hashlib
import os
import re
import shutil
from pathlib import Path

from revlib.train.durable import sync
from revlib.train.errors import CheckpointError

SUMS = "SHA256SUMS"


def partial_path(run: Path, step: int) -> Path:
    """Returns where the checkpoint of a step is written before it has its final name."""
    return run / "checkpoints" / f"step-{step:08d}.partial"


def publish(partial: Path) -> None:
    """Gives a folder that has been filled its final name, and points `latest` to it."""
    (partial / SUMS).write_text("".join(_sums(partial).values()))
    for file in partial.iterdir():
        sync(file)
    sync(partial)

    checkpoint = partial.with_suffix("")
    if checkpoint.exists():
        # `latest` points to an earlier one: this one's run died before it could move the link.
        shutil.rmtree(checkpoint)
    os.rename(partial, checkpoint)
    sync(checkpoint.parent)

    run = checkpoint.parent.parent
    link, new_link = run / "latest", run / "latest.partial"
    previous = link.resolve().name
    new_link.unlink(missing_ok=True)
    new_link.symlink_to(checkpoint.relative_to(run))
    os.replace(new_link, link)
    sync(run)

    for other in (*find_all(run), *(run / "checkpoints").glob("step-*.partial")):
        if other.name not in (checkpoint.name, previous):
            shutil.rmtree(other)


def find_all(run: Path) -> list[Path]:
    """Returns the checkpoints of a run, whole or not, the oldest first."""
    found = (run / "checkpoints").glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d+", path.name))


def latest(run: Path) -> Path:
    """Returns the checkpoint that `latest` points to, once every file in it has been checked.

    Raises:
        CheckpointError: It is missing or not as it was written.
    """
    link = run / "latest"
    checkpoint = link.resolve()
    fault = _find_fault(checkpoint) if link.is_symlink() else "it is no link to a checkpoint"
    if fault is None:
        return checkpoint
    others = [other for other in find_all(run) if other.name != checkpoint.name]
    whole = [other.name for other in others if _find_fault(other) is None]
    # Where `latest` is a folder, `ln` alone would put the link into it.
    aside = f"mv {link} {link}.old && " if link.is_dir() and not link.is_symlink() else ""
    remedy = f"; `{aside}ln -sfn checkpoints/{whole[-1]} {link}` goes back" if whole else ""
    raise CheckpointError(f"{link} cannot be resumed: {fault}{remedy}")


def _find_fault(checkpoint: Path) -> str | None:
    """Says what is not as it was written, if anything."""
    try:
        written = (checkpoint / SUMS).read_text().splitlines(keepends=True)
        present = _sums(checkpoint)
    except (OSError, UnicodeDecodeError):
        return f"{SUMS} of {checkpoint.name} cannot be read"
    changed = [name for name, line in present.items() if line not in written]
    missing = [line.partition("  ")[2] for line in written if line not in present.values()]
    if changed:
        return f"{changed[0]} of {checkpoint.name} is not what {SUMS} says"
    if missing:
        return f"{missing[0].strip()} of {checkpoint.name} is missing"
    return None


def _sums(checkpoint: Path) -> dict[str, str]:
    """Returns a line of `SHA256SUMS` for each file."""
    files = [file for file in sorted(checkpoint.iterdir()) if file.name != SUMS]
    return {file.name: f"{_digest(file)}  {file.name}\n" for file in files}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
