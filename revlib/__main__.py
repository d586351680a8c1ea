"""The command `revlib`, also `python -m revlib`: one line, too, for what stops it at its start.

PyTorch and the rest take seconds to import, so what may go wrong meanwhile is seen to first.
"""

import os
import signal
import sys
from types import FrameType


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; see `revlib.train.cli.main`."""
    signal.signal(signal.SIGINT, _stop)
    try:
        from revlib.train import cli
    except ModuleNotFoundError as error:
        sys.exit(f"revlib: no {error.name} here; `pip install 'revlib-torch[train]'` brings it")
    cli.main(arguments)


def _stop(signal_number: int, frame: FrameType | None) -> None:
    # No exception: amid an import it would come out as any other, or not at all.
    if os.environ.get("RANK", "0") == "0":
        os.write(sys.stderr.fileno(), b"revlib: stopped\n")
    os._exit(128 + signal_number)


if __name__ == "__main__":
    main()
