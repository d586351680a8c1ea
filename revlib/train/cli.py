"""The command `revlib train`: one option per setting, and one line per error."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from accelerate import PartialState
from rich.console import Console
from typer import Option

from revlib import __version__
from revlib.train import points
from revlib.train.display import progress_bar, result_table
from revlib.train.errors import CheckpointError, InputError, Interrupted, NonFiniteError
from revlib.train.loop import train
from revlib.train.settings import MODELS, POLICIES, PRECISIONS, Settings

app = typer.Typer(
    help="Reversible networks for PyTorch.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 1 failed, 2 bad input, 128 + signal interrupted."""
    try:
        sys.exit(app(arguments, prog_name="revlib", standalone_mode=False))
    except typer.TyperException as error:
        if message := error.format_message():  # There is none with the help of a bare `revlib`.
            _print_error(message)
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"revlib {__version__}")
        raise typer.Exit


@app.callback()
def revlib(
    version: Annotated[
        bool,
        Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Reversible networks for PyTorch."""  # Its being there makes `train` a subcommand.


@app.command("train")
def train_command(
    data: Annotated[
        str,
        Option(
            help="`digits`, an .npz file as Keras writes it, or a folder by class; a flow also "
            f"takes an .npz file without labels or of vectors, {', '.join(points.NAMES)}."
        ),
    ],
    out: Annotated[Path, Option(help="The folder of the run.")],
    model: Annotated[str, Option(help=f"{', '.join(MODELS)}.")] = Settings.model,
    policy: Annotated[
        str | None,
        Option(
            help=f"For a revnet, an irevnet or a flow: {', '.join(POLICIES)}.",
            show_default="rebuild",
        ),
    ] = Settings.policy,
    exact: Annotated[
        bool | None,
        Option(
            "--exact/--no-exact",
            help="For a revnet, an irevnet or a flow: rebuild to the last bit.",
            show_default="exact for an irevnet only",
        ),
    ] = Settings.exact,
    dropout: Annotated[
        float, Option(help="For a classifier: share of activations to drop.")
    ] = Settings.dropout,
    levels: Annotated[
        int | None,
        Option(
            help="For a flow of images: scales.",
            show_default="2 for realnvp and otherwise 3, or the fewer that fit",
        ),
    ] = Settings.levels,
    flow_steps: Annotated[
        int | None,
        Option(
            help="For a flow: steps per level, or couplings of a nice or realnvp.",
            show_default="the paper's; 8 for vectors",
        ),
    ] = Settings.flow_steps,
    hidden: Annotated[
        int | None,
        Option(
            help="For a flow: width of its networks.", show_default="the paper's; 64 for vectors"
        ),
    ] = Settings.hidden,
    epochs: Annotated[int, Option(help="Times to see every training sample.")] = Settings.epochs,
    batch_size: Annotated[
        int, Option(help="Samples per step, over all processes and parts.")
    ] = Settings.batch_size,
    lr: Annotated[
        float | None, Option(help="Peak learning rate.", show_default="0.1; 0.001 for a flow")
    ] = Settings.lr,
    weight_decay: Annotated[
        float | None, Option(help="L2 penalty.", show_default="0.0001; 0 for a flow")
    ] = Settings.weight_decay,
    image_size: Annotated[
        int | None, Option(help="Resize the images of a folder to squares.")
    ] = Settings.image_size,
    augment: Annotated[
        bool,
        Option("--augment", help="For a classifier: random crops (border 4) and mirror images."),
    ] = Settings.augment,
    seed: Annotated[int, Option(help="Of everything random.")] = Settings.seed,
    mixed_precision: Annotated[
        str, Option(help=f"{', '.join(PRECISIONS)}.")
    ] = Settings.mixed_precision,
    accumulate: Annotated[
        int, Option(help="Parts to split a batch into, to need less memory.")
    ] = Settings.accumulate,
    checkpoint_every: Annotated[
        int, Option(help="Steps between checkpoints; each epoch ends with one.")
    ] = Settings.checkpoint_every,
    picture_every: Annotated[
        int | None,
        Option(
            help="For a flow: steps between pictures; the run ends with some.",
            show_default="at the end only",
        ),
    ] = Settings.picture_every,
    resume: Annotated[bool, Option("--resume", help="Go on with the run in --out.")] = False,
    quiet: Annotated[bool, Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Trains a classifier on labelled images, or a flow on images or vectors.

    Ctrl-C and SIGTERM write a checkpoint and leave; `--resume` goes on to the same result.

    On several devices: `accelerate launch -m revlib.train ...`, on CPUs with `torchrun
    --nproc-per-node 2` in place of `accelerate launch`.
    """
    with _one_line_errors():
        settings = Settings(
            data=data,
            out=out,
            model=model,
            policy=policy,
            exact=exact,
            dropout=dropout,
            levels=levels,
            flow_steps=flow_steps,
            hidden=hidden,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            weight_decay=weight_decay,
            image_size=image_size,
            augment=augment,
            seed=seed,
            mixed_precision=mixed_precision,
            accumulate=accumulate,
            checkpoint_every=checkpoint_every,
            picture_every=picture_every,
        )
        if quiet or not _is_main_process():
            train(settings, resume=resume)
        else:
            with progress_bar(settings.epochs) as show:
                result = train(settings, resume=resume, on_progress=show)
            Console().print(result_table(result, settings))
        _leave_the_group()


def _leave_the_group() -> None:
    """Ends a run of several processes; torch would warn if nobody did."""
    state = PartialState()
    if state.num_processes == 1:
        return
    # One that leaves early can bring the others down, and threads of the group that outlive it
    # can abort Python's own clean-up.
    state.wait_for_everyone()
    state.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Ends the command with one line and a status of its own for each way to fail."""
    try:
        yield
    except Interrupted as error:
        _fail(str(error), 128 + error.signal_number)
    except InputError as error:
        options = {field.name for field in dataclasses.fields(Settings)}
        message = str(error)
        if error.argument in options:
            option = "--" + error.argument.replace("_", "-")
            message = option + message.removeprefix(error.argument)
        _fail(message, 2)
    except CheckpointError as error:
        _fail(str(error), 2)
    except (NonFiniteError, OSError) as error:
        _fail(str(error), 1)


def _fail(message: str, status: int) -> NoReturn:
    _print_error(message)
    raise typer.Exit(status)


def _print_error(message: str) -> None:
    if _is_main_process():
        print(f"revlib: {' '.join(message.splitlines())}", file=sys.stderr)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
