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
from torch.nn import functional as F

from revlib.models import create_model
from revlib.train import state
from revlib.train.data import Images, load_data
from revlib.train.errors import InputError, Interrupted, NonFiniteError, first_line
from revlib.train.folder import claimed
from revlib.train.interrupt import StopRequest, stop_requests
from revlib.train.randomness import augment, derive_seed, shuffled
from revlib.train.results import Epoch, Progress, Result, write_metrics, write_summary
from revlib.train.schedule import learning_rate
from revlib.train.settings import Settings

MOMENTUM = 0.9
# After how many steps the loss is read. A GPU idles meanwhile, so there it is not every one.
STEPS_PER_LOOK = {"cpu": 1}

OnProgress = Callable[[Progress], None]


def train(
    settings: Settings, *, resume: bool = False, on_progress: OnProgress | None = None
) -> Result:
    """Trains a classifier, or goes on with a run that was interrupted.

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
    images = load_data(settings.data, image_size=settings.image_size)
    _check_batch_size(settings, len(images.x_train), accelerator.num_processes)
    claim = claimed(settings.out, resume=resume, lock=accelerator.is_main_process)
    with claim, stop_requests() as stop:
        run = Run(settings, images, accelerator, stop, on_progress)
        if resume:
            run.load()
        else:
            run.save()
        return run.train()


class Run:
    """A run at some step: it goes on by steps and epochs, and is saved and loaded."""

    def __init__(
        self,
        settings: Settings,
        images: Images,
        accelerator: Accelerator,
        stop: StopRequest,
        on_progress: OnProgress | None,
    ) -> None:
        self.settings = settings
        self.images = images
        self.accelerator = accelerator
        self.stop = stop
        self.on_progress = on_progress if accelerator.is_main_process else None

        torch.manual_seed(settings.seed)
        options = {"policy": settings.policy} if settings.model.startswith("revnet") else {}
        model = create_model(
            settings.model,
            num_classes=images.classes,
            in_channels=images.x_train.shape[1],
            dropout=settings.dropout,
            **options,
        )
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        optimizer = torch.optim.SGD(
            model.parameters(), settings.lr, MOMENTUM, weight_decay=settings.weight_decay
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.mean = images.mean[:, None, None].to(accelerator.device)
        self.std = images.std[:, None, None].to(accelerator.device)

        self.epoch_steps = len(images.x_train) // settings.batch_size
        self.steps = settings.epochs * self.epoch_steps
        self.steps_per_look = STEPS_PER_LOOK.get(accelerator.device.type, 10)

        self.state = state.State()
        self.totals = torch.zeros(2, device=self.accelerator.device)
        self.saved_step: int | None = None

    def train(self) -> Result:
        """Goes on until the last epoch is complete."""
        while len(self.state.history) < self.settings.epochs:
            train_loss, train_accuracy = self._train_epoch()
            self.save()
            test_loss, test_accuracy = self._test()
            epoch = Epoch(
                epoch=len(self.state.history) + 1,
                step=self.state.step,
                lr=learning_rate(self.state.step - 1, self.steps, self.settings.lr),
                train_loss=train_loss,
                train_accuracy=train_accuracy,
                test_loss=test_loss,
                test_accuracy=test_accuracy,
            )
            self.state.history.append(epoch)
            self.totals = torch.zeros_like(self.totals)
            if self.accelerator.is_main_process:
                write_metrics(self.settings.out, self.state.history)
            self._report(train_loss, train_accuracy)
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
        self.state = state.load(self.accelerator, self.settings.out, self._deciding_settings())
        totals = self.state.totals[self.accelerator.process_index]
        self.totals = torch.tensor(totals, device=self.accelerator.device)
        self.saved_step = self.state.step

    def _train_epoch(self) -> tuple[float, float]:
        """Goes on to the end of the epoch; returns the mean loss and accuracy over it."""
        epoch, batch_size = len(self.state.history), self.settings.batch_size
        seed = derive_seed(self.settings.seed, "order", epoch)
        # The images that do not fill a batch wait for the next epoch's order.
        batches = shuffled(len(self.images.x_train), seed).split(batch_size)[: self.epoch_steps]
        done = self.state.step - epoch * self.epoch_steps
        loss = accuracy = math.nan

        self.model.train()
        for taken, batch in enumerate(batches[done:]):
            begun = time.perf_counter()
            self._train_step(batch)
            save_is_due = self.state.step % self.settings.checkpoint_every == 0
            if save_is_due or taken % self.steps_per_look == 0:
                loss, accuracy = self._look(self.totals, (done + taken + 1) * batch_size)
            self.state.seconds += time.perf_counter() - begun
            if save_is_due:
                self.save()
            self._report(loss, accuracy)
        return self._look(self.totals, len(batches) * batch_size)

    def _train_step(self, batch: Tensor) -> None:
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed(derive_seed(self.settings.seed, "step", self.state.step, process))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.state.step, self.steps, self.settings.lr)
        parts = batch.chunk(processes * self.settings.accumulate)
        for part in parts[process::processes]:
            x = self.images.x_train[part].to(self.accelerator.device)
            if self.settings.augment:
                x = augment(x)
            with self.accelerator.accumulate(self.model):
                loss = self._loss(x, self.images.y_train[part], self.totals)
                self.accelerator.backward(loss / len(part))
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.state.step += 1

    @torch.no_grad()
    def _test(self) -> tuple[float, float]:
        """Returns the mean loss and accuracy over the test images."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        totals = torch.zeros_like(self.totals)
        images = 0
        self.model.eval()
        for batch in torch.arange(len(self.images.x_test)).split(self.settings.batch_size):
            part = batch[process::processes]
            x = self.images.x_test[part].to(self.accelerator.device)
            self._loss(x, self.images.y_test[part], totals)
            images += len(batch)
            loss, accuracy = self._look(totals, images)
        return loss, accuracy

    def _loss(self, x: Tensor, y: Tensor, totals: Tensor) -> Tensor:
        """Returns the sum of the losses, and adds it and the right answers to `totals`."""
        y = y.to(x.device)
        logits = self.model((x - self.mean) / self.std)
        loss = F.cross_entropy(logits, y, reduction="sum")
        totals += torch.stack((loss.detach(), (logits.argmax(1) == y).sum()))
        return loss

    def _look(self, totals: Tensor, images: int) -> tuple[float, float]:
        """Reads the mean loss and accuracy over all processes, and stops if there is cause."""
        signal_number = torch.tensor([self.stop.signal_number]).to(totals)
        rows = self.accelerator.gather(torch.cat((totals, signal_number))[None]).tolist()
        losses, right_answers, signal_numbers = zip(*rows, strict=True)
        loss = sum(losses) / images
        if not math.isfinite(loss):
            raise NonFiniteError(f"loss must stay finite; got {loss} at step {self.state.step}")
        if any(signal_numbers):
            self.save()
            raise Interrupted(int(max(signal_numbers)), self.settings.out)
        return loss, sum(right_answers) / images

    def _report(self, loss: float, accuracy: float) -> None:
        if self.on_progress:
            self.on_progress(
                Progress(
                    step=self.state.step,
                    steps=self.steps,
                    loss=loss,
                    accuracy=accuracy,
                    images_per_second=self._images_per_second(),
                    history=tuple(self.state.history),
                )
            )

    def _images_per_second(self) -> float:
        return self.state.step * self.settings.batch_size / self.state.seconds

    def _deciding_settings(self) -> dict[str, object]:
        """What the numbers of a run depend on: a resumed run has to have the same."""
        deciding = dataclasses.asdict(self.settings)
        for name in ("out", "image_size", "checkpoint_every"):
            del deciding[name]
        deciding["data"] = self.images.fingerprint
        deciding["processes"] = self.accelerator.num_processes
        return deciding

    def _result(self) -> Result:
        last = self.state.history[-1]
        return Result(
            test_accuracy=last.test_accuracy,
            test_loss=last.test_loss,
            train_accuracy=last.train_accuracy,
            train_loss=last.train_loss,
            parameters=self.parameters,
            epochs=last.epoch,
            steps=last.step,
            seconds=self.state.seconds,
            images_per_second=self._images_per_second(),
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


def _check_batch_size(settings: Settings, images: int, processes: int) -> None:
    parts = processes * settings.accumulate
    if settings.batch_size % parts:
        rule = f"must be a multiple of {parts} (processes times accumulate)"
        raise InputError("batch_size", rule, settings.batch_size)
    if settings.batch_size > images:
        rule = f"must be at most {images}, the number of training images"
        raise InputError("batch_size", rule, settings.batch_size)
