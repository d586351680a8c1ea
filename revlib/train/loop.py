"""The training loop: optimizer steps, each of which depends on nothing but the one before.

Accelerate places model and batches, casts, accumulates, keeps processes together, and
writes and reads the state of model and optimizer. All else that a resumed run needs is a
few numbers, because nothing random has a state (see `randomness`). So on a CPU, with the
same number of threads, a resumed run is bitwise the run that was never interrupted.
"""

import dataclasses
import math
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from revlib.memory import MIB, measure_step
from revlib.train import state
from revlib.train.classification import Classification
from revlib.train.density import Density
from revlib.train.durable import write_bytes
from revlib.train.errors import InputError, Interrupted, NonFiniteError, first_line
from revlib.train.folder import claimed
from revlib.train.interrupt import StopRequest, stop_requests
from revlib.train.randomness import derive_seed, shuffled
from revlib.train.results import AnyProgress, AnyResult, write_metrics, write_summary
from revlib.train.schedule import learning_rate
from revlib.train.settings import FLOWS, Settings
from revlib.train.task import Batch, Task

# After how many steps the loss is read. A GPU idles meanwhile, so there it is not every one.
STEPS_PER_LOOK = {"cpu": 1}
# Settings that the numbers of a run do not depend on.
FREE = ("out", "image_size", "checkpoint_every", "picture_every")

OnProgress = Callable[[AnyProgress], None]


def train(
    settings: Settings, *, resume: bool = False, on_progress: OnProgress | None = None
) -> AnyResult:
    """Trains a classifier or a flow, or goes on with a run that was interrupted.

    Args:
        settings: What to train, on what, how, and where the results go.
        resume: Whether to go on from the checkpoint that `latest` in the folder points to.
        on_progress: Called after every optimizer step and every epoch, in the main process.

    Raises:
        InputError: The settings, the data and the folder do not go together.
        CheckpointError: The checkpoint to resume from is damaged.
        NonFiniteError: The loss or a weight became infinite or NaN.
        Interrupted: Ctrl-C or SIGTERM came; a checkpoint was written first.
    """
    accelerator = _start_accelerator(settings)
    task = (Density if settings.model in FLOWS else Classification)(settings)
    _check_batch_size(settings, len(task.data.x_train), accelerator.num_processes)
    claim = claimed(settings.out, resume=resume, lock=accelerator.is_main_process)
    with claim, stop_requests() as stop:
        run = Run(task, accelerator, stop, on_progress)
        if resume:
            run.load()
        else:
            run.save()
        return run.train()


class Run:
    """A run at some step: it goes on by steps and epochs, and is saved and loaded."""

    def __init__(
        self,
        task: Task,
        accelerator: Accelerator,
        stop: StopRequest,
        on_progress: OnProgress | None,
    ) -> None:
        self.task = task
        self.settings = task.settings
        self.data = task.data
        self.accelerator = accelerator
        self.stop = stop
        self.on_progress = on_progress if accelerator.is_main_process else None

        torch.manual_seed(self.settings.seed)
        model = task.build_model()
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.model, self.optimizer = accelerator.prepare(model, task.make_optimizer(model))

        self.epoch_steps = len(self.data.x_train) // self.settings.batch_size
        self.steps = self.settings.epochs * self.epoch_steps
        self.steps_per_look = STEPS_PER_LOOK.get(accelerator.device.type, 10)

        self.state = state.State()
        self.totals = torch.zeros(task.totals, device=accelerator.device)
        self.saved_step: int | None = None

    def train(self) -> AnyResult:
        """Goes on until the last epoch is complete."""
        while len(self.state.history) < self.settings.epochs:
            train_figures = self._train_epoch()
            self.save()
            test_figures = self._test()
            epoch = self.task.epoch(
                epoch=len(self.state.history) + 1,
                step=self.state.step,
                lr=learning_rate(self.state.step - 1, self.steps, self.settings.lr),
                **{f"train_{name}": value for name, value in train_figures.items()},
                **{f"test_{name}": value for name, value in test_figures.items()},
                **self._memory(),
            )
            self.state.history.append(epoch)
            self.totals = torch.zeros_like(self.totals)
            if self.accelerator.is_main_process:
                write_metrics(self.settings.out, self.state.history)
            self._report(train_figures)
        self._draw()
        result = self._result()
        if self.accelerator.is_main_process:
            write_summary(self.settings.out, result)
        return result

    def save(self) -> None:
        """Writes a checkpoint, unless this step has one."""
        if not all(weight.isfinite().all() for weight in self.model.parameters()):
            raise NonFiniteError(f"weights must stay finite; got others at step {self.state.step}")
        if self.saved_step != self.state.step:
            self.state.totals = self.accelerator.gather(self.totals[None]).tolist()
            state.save(self.accelerator, self.settings.out, self._deciding_settings(), self.state)
            self.saved_step = self.state.step

    def load(self) -> None:
        """Reads the latest checkpoint."""
        self.state = state.load(
            self.accelerator, self.settings.out, self._deciding_settings(), self.task.epoch
        )
        totals = self.state.totals[self.accelerator.process_index]
        self.totals = torch.tensor(totals, device=self.accelerator.device)
        self.saved_step = self.state.step

    def _train_epoch(self) -> dict[str, float]:
        """Goes on to the end of the epoch; returns the figures over it."""
        epoch, batch_size = len(self.state.history), self.settings.batch_size
        seed = derive_seed(self.settings.seed, "order", epoch)
        # The samples that do not fill a batch wait for the next epoch's order.
        batches = shuffled(len(self.data.x_train), seed).split(batch_size)[: self.epoch_steps]
        done = self.state.step - epoch * self.epoch_steps
        figures = self.task.figures([math.nan] * len(self.totals), 1)

        self.model.train()
        for taken, batch in enumerate(batches[done:]):
            begun = time.perf_counter()
            self._train_step(batch)
            save_is_due = self.state.step % self.settings.checkpoint_every == 0
            if save_is_due or taken % self.steps_per_look == 0:
                figures = self._look(self.totals, (done + taken + 1) * batch_size)
            self.state.seconds += time.perf_counter() - begun
            if self.task.measures_memory and self.state.peak_activation_bytes is None:
                self._measure_memory(batch)
            if save_is_due:
                self.save()
            if self.settings.picture_every and self.state.step % self.settings.picture_every == 0:
                self._draw()
            self._report(figures)
        return self._look(self.totals, len(batches) * batch_size)

    def _train_step(self, batch: Tensor) -> None:
        torch.manual_seed(self._derive_seed("step", self.state.step))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.state.step, self.steps, self.settings.lr)
        for part in self._parts(batch):
            samples = self.task.batch(part, self.accelerator.device, training=True)
            with self.accelerator.accumulate(self.model):
                self._backward(samples, self.totals)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.state.step += 1

    def _parts(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Returns the parts of a batch that this process works through."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        return batch.chunk(processes * self.settings.accumulate)[process::processes]

    def _backward(self, samples: Batch, totals: Tensor) -> None:
        loss = self._loss(samples, totals)
        self.accelerator.backward(loss / len(samples[0]))

    def _measure_memory(self, batch: Tensor) -> None:
        """Measures a forward and a backward pass that nothing is learned from."""
        samples = self.task.batch(self._parts(batch)[0], self.accelerator.device, training=True)
        totals = torch.zeros_like(self.totals)
        memory = measure_step(
            lambda: self._backward(samples, totals),
            model=self.accelerator.unwrap_model(self.model),
            optimizer=self.optimizer,
        )
        self.state.peak_activation_bytes = memory.peak.activations
        self.optimizer.zero_grad()

    @torch.no_grad()
    def _test(self) -> dict[str, float]:
        """Returns the figures over the test samples."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        totals = torch.zeros_like(self.totals)
        samples = 0
        self.model.eval()
        for batch in torch.arange(len(self.data.x_test)).split(self.settings.batch_size):
            # A figure that depends on random draws depends on the same ones after every epoch.
            torch.manual_seed(self._derive_seed("test", samples))
            part = batch[process::processes]
            self._loss(self.task.batch(part, self.accelerator.device, training=False), totals)
            samples += len(batch)
            figures = self._look(totals, samples)
        return figures

    def _loss(self, samples: Batch, totals: Tensor) -> Tensor:
        try:
            return self.task.loss(self.model, samples, totals)
        except ArithmeticError as error:  # From a flow, which names the layer.
            raise NonFiniteError(f"{error} at step {self.state.step}") from error

    def _look(self, totals: Tensor, samples: int) -> dict[str, float]:
        """Reads the figures over all processes, and stops if there is cause."""
        signal_number = torch.tensor([self.stop.signal_number]).to(totals)
        rows = self.accelerator.gather(torch.cat((totals, signal_number))[None]).tolist()
        *columns, signal_numbers = zip(*rows, strict=True)
        sums = [sum(column) for column in columns]
        loss = sums[0] / samples
        if not math.isfinite(loss):
            raise NonFiniteError(f"loss must stay finite; got {loss} at step {self.state.step}")
        if any(signal_numbers):
            self.save()
            raise Interrupted(int(max(signal_numbers)), self.settings.out)
        return self.task.figures(sums, samples)

    def _draw(self) -> None:
        """Writes pictures, and leaves the model and the random numbers as they are."""
        if not self.accelerator.is_main_process:
            return
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(derive_seed(self.settings.seed, "pictures"))
            pictures = self.task.draw(model)
        model.train(training)
        for name, png in pictures.items():
            folder = self.settings.out / "pictures"
            folder.mkdir(exist_ok=True)
            write_bytes(folder / f"{name}-{self.state.step:08d}.png", png)

    def _report(self, figures: dict[str, float]) -> None:
        if self.on_progress:
            self.on_progress(
                self.task.progress(
                    step=self.state.step,
                    steps=self.steps,
                    **figures,
                    **self._speed(),
                    **self._memory(),
                    history=tuple(self.state.history),
                )
            )

    def _speed(self) -> dict[str, float]:
        return {self.task.speed: self.state.step * self.settings.batch_size / self.state.seconds}

    def _memory(self) -> dict[str, float]:
        if self.state.peak_activation_bytes is None:
            return {}
        return {"peak_activation_mib": self.state.peak_activation_bytes / MIB}

    def _derive_seed(self, *place: object) -> int:
        return derive_seed(self.settings.seed, *place, self.accelerator.process_index)

    def _deciding_settings(self) -> dict[str, object]:
        """What the numbers of a run depend on: a resumed run has to have the same."""
        deciding = {
            name: value
            for name, value in dataclasses.asdict(self.settings).items()
            if name not in FREE and value is not None
        }
        deciding["data"] = self.data.fingerprint
        deciding["processes"] = self.accelerator.num_processes
        return deciding

    def _result(self) -> AnyResult:
        last = dataclasses.asdict(self.state.history[-1])
        figures = {name: last[name] for name in last if name.startswith(("train_", "test_"))}
        return self.task.result(
            **figures,
            parameters=self.parameters,
            epochs=last["epoch"],
            steps=last["step"],
            seconds=self.state.seconds,
            **self._speed(),
            **self._memory(),
            settings=self._deciding_settings(),
            device=str(self.accelerator.device),
            torch=torch.__version__,
        )


def _start_accelerator(settings: Settings) -> Accelerator:
    rule = "must be one that this machine can do"
    try:
        accelerator = Accelerator(
            # Without this, processes on a machine without a GPU would not know of each other.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=settings.mixed_precision,
            gradient_accumulation_steps=settings.accumulate,
        )
    except ValueError as error:
        value = f"{settings.mixed_precision} ({first_line(error)})"
        raise InputError("mixed_precision", rule, value) from error
    # Accelerate would train in float32 without a word.
    if settings.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("mixed_precision", rule, "fp16 on a CPU")
    return accelerator


def _check_batch_size(settings: Settings, samples: int, processes: int) -> None:
    parts = processes * settings.accumulate
    if settings.batch_size % parts:
        rule = f"must be a multiple of {parts} (processes times accumulate)"
        raise InputError("batch_size", rule, settings.batch_size)
    if settings.batch_size > samples:
        rule = f"must be at most {samples}, the number of training samples"
        raise InputError("batch_size", rule, settings.batch_size)
