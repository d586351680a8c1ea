"""The folder of a run: one run at a time writes into it, and none over another's results."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from revlib.train import checkpoint
from revlib.train.errors import InputError


@contextmanager
def claimed(out: Path, *, resume: bool, lock: bool) -> Iterator[None]:
    """Holds the folder, made if need be, for one run.

    Args:
        resume: Whether the folder must hold a run, rather than none.
        lock: Whether to keep other processes out; one process of a run is enough.

    Raises:
        InputError: It cannot be written, another process holds it, or it holds a run although
            none is to be resumed, or none although one is.
    """
    if resume and not _holds_run(out):
        raise InputError("out", "must hold a run to resume", out)
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        for folder in (out, out / "checkpoints"):
            tempfile.TemporaryFile(dir=folder).close()
        descriptor = os.open(out, os.O_RDONLY)
    except OSError as error:
        rule = "must be a folder that can be written"
        raise InputError("out", rule, f"{out} ({error.strerror})") from error
    try:
        if lock:
            _lock(descriptor, out)
        if not resume and _holds_run(out):
            raise InputError("out", "must not hold a run yet, unless --resume is given", out)
        yield
    finally:
        os.close(descriptor)  # The lock goes with it, as it does when the process is killed.


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError("out", "must not be in use by another run", out) from None
    except OSError:
        pass  # A network file system without locks: training must still be possible there.


def _holds_run(out: Path) -> bool:
    # A run that died before its first `latest` has left the checkpoint of step 0, and no more.
    checkpoints = [path for path in checkpoint.find_all(out) if path.name != "step-00000000"]
    names = ("latest", "metrics.jsonl", "summary.json")
    return bool(checkpoints) or any(os.path.lexists(out / name) for name in names)
