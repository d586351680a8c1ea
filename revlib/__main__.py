"""The command `revlib`, also `python -m revlib`; without its extra it says so in one line."""

import sys


def main() -> None:
    """Runs `revlib train`, the only command so far."""
    try:
        from revlib.train import cli
    except ModuleNotFoundError as error:
        sys.exit(f"revlib: no {error.name} here; `pip install 'revlib-torch[train]'` brings it")
    cli.main()


if __name__ == "__main__":
    main()
