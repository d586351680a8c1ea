"""`python -m revlib.train ...` is `revlib train ...`, for launchers that start a module."""

import sys

from revlib.train.cli import main

main(["train", *sys.argv[1:]])
