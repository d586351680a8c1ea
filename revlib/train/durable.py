"""Writing files so that a kill, or a power cut, at any instant leaves the old or the new one."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Returns when the file, or the list of names in the folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the file by one with this content."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)
