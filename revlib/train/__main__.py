"""`python -m revlib.train ...` is `revlib train ...`, for launchers that start a module."""

import sys

from revlib.__main__ import main

main(["train", *sys.argv[1:]])
