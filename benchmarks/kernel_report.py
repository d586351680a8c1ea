"""The figures of the kernels: what is kept of each measurement, its verdicts, the tables."""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.reporting import markdown_table
from revlib.memory import MIB

SHARE_OF_COPY = 0.90
SHARE_OF_BYTE_RATIO = 0.80

METHOD = """\
- *of copy*: the bytes that the op must move (each input read once, each output written once)
  over the kernel's time, as a share of what a device-to-device copy of as many bytes reached in
  turn with it. Target: at least 90 %.
- *eager / kernel*: the time of the same op in plain PyTorch over the kernel's, beside the ratio
  of the bytes that they move. Target: at least 0.8 times the ratio of the bytes.
- *compiled / kernel*: the same for `torch.compile` of the plain PyTorch. Target: at least 1.00.
- Times are medians over rounds of all four in turn, A B C D A B C D, by CUDA events around the
  call, from a flushed cache, the launches queued in advance. Peak memory is what the call
  allocates, from a pass of its own.
- Before it is timed, every output of a kernel is compared with float64: the norm of its error
  may be twice that of plain PyTorch in the same dtype, and one unit in the last place more.
- *no kernel*: the op is PyTorch's own on every device; its eager time is its time.
- A step is timed by the host's clock, with kernels on and off in turn. Additive couplings have
  no kernel, so that a RevNet's ratio can only be 1."""


@dataclass(frozen=True)
class OpFigures:
    """One call of one op on tensors of one size.

    Attributes:
        name: The call, the dtype and the size.
        shapes: The shapes of the tensors that the op was called with.
        minimum_bytes: What any implementation must move.
        eager_bytes: What plain PyTorch moves.
        seconds: The median times of "kernel", "eager", "compiled" and "copy"; without "kernel"
            if the op has none, and without "compiled" if that failed.
        peak_bytes: What each of them allocates; None on a CPU.
    """

    name: str
    shapes: list[list[int]]
    minimum_bytes: int
    eager_bytes: int
    seconds: dict[str, float]
    peak_bytes: dict[str, int | None]

    @property
    def has_kernel(self) -> bool:
        return "kernel" in self.seconds

    @property
    def own_seconds(self) -> float:
        return self.seconds["kernel" if self.has_kernel else "eager"]

    @property
    def of_copy(self) -> float:
        return self.seconds["copy"] / self.own_seconds

    @property
    def byte_ratio(self) -> float:
        return self.eager_bytes / self.minimum_bytes

    def over_own(self, other: str) -> float | None:
        """How many times as long as the op itself another form of it takes."""
        return self.seconds[other] / self.own_seconds if other in self.seconds else None

    @property
    def missed(self) -> list[str]:
        """The targets that this call misses."""
        compiled = self.over_own("compiled")
        missed = ["copy"] if self.of_copy < SHARE_OF_COPY else []
        if self.has_kernel and self.over_own("eager") < SHARE_OF_BYTE_RATIO * self.byte_ratio:
            missed.append("eager")
        if self.has_kernel and compiled is not None and round(compiled, 2) < 1:
            missed.append("compiled")
        return missed


@dataclass(frozen=True)
class StepFigures:
    """A whole step with kernels on and off: the seconds of each round, and the memory."""

    name: str
    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int | None]

    @property
    def ratios(self) -> list[float]:
        return [off / on for on, off in zip(*self.seconds.values(), strict=True)]


@dataclass
class Results:
    """All of a run.

    Attributes:
        made_by: What the figures depend on.
        ops: The calls that were measured.
        steps: The steps that were measured.
        failed: What failed, and how.
        left_out: What there was no time for.
    """

    made_by: dict[str, str]
    ops: list[OpFigures] = field(default_factory=list)
    steps: list[StepFigures] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def done(self) -> set[str]:
        """The names of what needs no second try."""
        return {figures.name for figures in (*self.ops, *self.steps)} | set(self.failed)

    def fail(self, name: str, error: Exception) -> None:
        self.failed[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"failed: {name}: {self.failed[name]}", flush=True)

    def write(self, path: Path) -> None:
        """Writes `path`, which ends in .json, and the Markdown beside it."""
        ops = [asdict(op) | {"missed": op.missed} for op in self.ops]
        path.write_text(json.dumps(asdict(self) | {"ops": ops}, indent=1) + "\n")
        path.with_suffix(".md").write_text(self.to_markdown())

    @classmethod
    def read(cls, path: Path) -> "Results":
        kept = json.loads(path.read_text())
        for op in kept["ops"]:
            del op["missed"]
        kept["ops"] = [OpFigures(**op) for op in kept["ops"]]
        kept["steps"] = [StepFigures(**step) for step in kept["steps"]]
        return cls(**kept)

    def to_markdown(self) -> str:
        parts = [
            "# Kernels on a GPU",
            "\n".join(f"- {name}: {text}" for name, text in self.made_by.items()),
            METHOD,
            "## Ops",
            markdown_table(OP_HEADER, map(op_line, self.ops)),
            "## Steps",
            markdown_table(STEP_HEADER, map(step_line, self.steps)),
        ]
        if self.failed:
            lines = (f"- {name}: {why}" for name, why in self.failed.items())
            parts += ["## Failed", "\n".join(lines)]
        if self.left_out:
            parts += ["## Not measured: no time left", "\n".join(f"- {n}" for n in self.left_out)]
        return "\n\n".join(parts) + "\n"


OP_HEADER = (
    "op", "MiB", "µs", "TB/s", "of copy", "eager / kernel", "bytes ratio",
    "compiled / kernel", "peak MiB: kernel, eager, compiled", "targets missed",
)  # fmt: skip
STEP_HEADER = ("step", "ms on", "ms off", "off / on", "peak MiB on", "peak MiB off")


def op_line(op: OpFigures) -> list[str]:
    eager, compiled = (op.over_own(other) for other in ("eager", "compiled"))
    return [
        op.name,
        f"{op.minimum_bytes / MIB:.0f}",
        f"{1e6 * op.own_seconds:.1f}",
        f"{op.minimum_bytes / op.own_seconds / 1e12:.2f}",
        f"{100 * op.of_copy:.0f} %",
        f"{eager:.2f}" if op.has_kernel else "no kernel",
        f"{op.byte_ratio:.2f}",
        "not measured" if compiled is None else f"{compiled:.2f}",
        ", ".join(mib(op.peak_bytes.get(form)) for form in ("kernel", "eager", "compiled")),
        ", ".join(op.missed) or "none",
    ]


def step_line(step: StepFigures) -> list[str]:
    first, median, third = statistics.quantiles(step.ratios, n=4, method="inclusive")
    return [
        step.name,
        *(f"{1000 * statistics.median(step.seconds[switch]):.2f}" for switch in ("on", "off")),
        f"{median:.2f} ± {(third - first) / 2:.2f}",
        *(mib(step.peak_bytes[switch]) for switch in ("on", "off")),
    ]


def mib(n_bytes: int | None) -> str:
    return "-" if n_bytes is None else f"{n_bytes / MIB:.0f}"
