"""The script that measures kernels on a GPU, run dry: on a CPU and for no figures."""

import json
from dataclasses import replace

import pytest
import torch

import revlib
from benchmarks import kernels_on_gpu
from benchmarks.kernel_cases import CASES, Case, Traffic, draw_coupling
from benchmarks.kernel_report import OpFigures, Results, StepFigures
from benchmarks.kernel_timing import in_turn
from revlib import functional

MIB = 2**20
AFFINE = Case("affine_coupling", draw_coupling)
MISSING = Case("no_such_coupling", draw_coupling)


@pytest.fixture(autouse=True)
def no_warning_of_numpy(monkeypatch):
    """Triton's interpreter computes with NumPy, which warns of infinities where a GPU does not."""
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("triton", reason="Triton is not installed")
    with numpy.errstate(all="ignore"):
        yield


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script on some cases; returns its exit status and what it wrote."""

    def run(*cases, arguments=()):
        monkeypatch.setattr(kernels_on_gpu, "CASES", cases)
        monkeypatch.setattr(kernels_on_gpu, "STEPS", {})
        status = kernels_on_gpu.main([str(tmp_path), "--device", "cpu", *arguments])
        (path,) = tmp_path.glob("*.json")
        return status, Results.read(path), path.with_suffix(".md").read_text()

    return run


def figures(kernel=1.0, eager=10.0, compiled=2.0, copy=1.0, eager_bytes=4 * MIB):
    """Figures of a call that needs no more than 1 MiB."""
    seconds = {"kernel": kernel, "eager": eager, "compiled": compiled, "copy": copy}
    return OpFigures("op, float32", [[1]], MIB, eager_bytes, seconds, {})


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's advice is no failure
def test_steps_and_ops_are_measured_and_found_right(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels_on_gpu, "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(kernels_on_gpu, "CASES", CASES[::4])

    assert kernels_on_gpu.main([str(tmp_path), "--device", "cpu"]) == 0

    (path,) = tmp_path.glob("*.json")
    results = Results.read(path)
    assert len(results.ops) == len(CASES[::4]) and len(results.steps) == 4


def test_cases_have_names_of_their_own():
    assert len({case.name for case in CASES}) == len(CASES)


def test_results_say_that_a_dry_run_has_no_figures(run):
    status, results, markdown = run(AFFINE)

    assert status == 0
    assert [op.name for op in results.ops] == [
        "affine coupling, float32, 0 MiB",
        "affine coupling, bfloat16, 0 MiB",
    ]
    assert "a dry run, whose times are no figures" in markdown


def test_a_dry_run_writes_no_results_to_keep():
    results = kernels_on_gpu.ROOT / "benchmarks/results"

    with pytest.raises(SystemExit):
        kernels_on_gpu.main([str(results), "--device", "cpu"])


def test_a_gpu_is_not_measured_in_the_interpreter(tmp_path):
    with pytest.raises(SystemExit):
        kernels_on_gpu.main([str(tmp_path), "--device", "cuda"])


def test_what_fails_is_named_and_the_rest_goes_on(run):
    status, results, markdown = run(MISSING, AFFINE)

    assert status == 1
    assert len(results.ops) == 2
    assert [why.partition(":")[0] for why in results.failed.values()] == ["AttributeError"] * 2
    assert "- no such coupling, float32, 0 MiB: AttributeError: module" in markdown


def test_a_wrong_kernel_is_not_timed(run, monkeypatch):
    right = functional.affine_coupling

    def wrong_with_kernels(x, h):
        y, log_det = right(x, h)
        return y, log_det + revlib.dispatch.kernels_apply_to(x)

    monkeypatch.setattr(functional, "affine_coupling", wrong_with_kernels)
    status, results, _ = run(AFFINE)

    assert status == 1 and results.ops == []
    assert all("output 1 is off by" in why for why in results.failed.values())


def test_a_kernel_that_does_not_run_is_not_timed(run, monkeypatch):
    def plain(x, h):
        with revlib.use_kernels(False):
            return functional.affine_coupling_inverse(x, h)

    monkeypatch.setattr(functional, "affine_coupling", plain)
    status, results, _ = run(AFFINE)

    assert status == 1 and results.ops == []
    assert all("no kernel ran" in why for why in results.failed.values())


def test_an_op_that_does_not_compile_is_measured_without(run, monkeypatch):
    def compile(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", compile)
    status, results, markdown = run(AFFINE)

    assert status == 1
    assert all(set(op.seconds) == {"kernel", "eager", "copy"} for op in results.ops)
    assert "affine coupling, float32, 0 MiB, compiled: RuntimeError: no compiler" in markdown


def test_what_there_is_no_time_for_is_named(run):
    status, results, markdown = run(AFFINE, arguments=("--minutes", "0"))

    assert status == 0 and results.ops == []
    assert "affine coupling, float32, 0 MiB" in results.left_out
    assert "no time left" in markdown


def test_a_resumed_run_keeps_what_was_measured(run):
    _, before, _ = run(AFFINE)

    _, after, _ = run(AFFINE, MISSING, arguments=("--resume", "4e9"))

    assert after.ops[:2] == before.ops
    assert len(after.failed) == 2


def test_a_lost_gpu_is_found_again_in_a_new_process(run, monkeypatch):
    started = []

    def execv(_, command):
        started.append(command)
        raise InterruptedError

    monkeypatch.setattr(kernels_on_gpu, "is_lost", lambda device: not started)
    monkeypatch.setattr(kernels_on_gpu.os, "execv", execv)
    with pytest.raises(InterruptedError):
        run(MISSING, AFFINE)
    (_, _, module, out, *options) = started[0]
    assert module == "benchmarks.kernels_on_gpu"

    assert kernels_on_gpu.main([out, *options]) == 1

    _, results, _ = run(MISSING, AFFINE, arguments=options)
    assert len(results.failed) == len(results.ops) == 2


def test_warming_compiles_and_measures_nothing(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(kernels_on_gpu, "CASES", (AFFINE, MISSING))
    monkeypatch.setattr(kernels_on_gpu.Forms, "compiled", lambda *_: lambda: compiled.append(1))

    assert kernels_on_gpu.main([str(tmp_path), "--device", "cpu", "--warm", "1/1"]) == 0

    assert len(compiled) == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("measured", "missed"),
    [
        (figures(), []),
        (figures(copy=0.89), ["copy"]),
        (figures(eager=3.1), ["eager"]),
        (figures(eager=3.2), []),
        (figures(compiled=0.99), ["compiled"]),
        (figures(compiled=0.996), []),
    ],
)
def test_targets_are_those_of_the_design(measured, missed):
    assert measured.missed == missed


def test_an_op_without_a_kernel_is_held_against_the_copy_alone():
    measured = figures(eager=2.0)
    del measured.seconds["kernel"]

    assert measured.missed == ["copy"]


def test_results_are_read_as_they_were_written(tmp_path):
    step = StepFigures("step", {"on": [1.0, 1.0], "off": [2.0, 3.0]}, {"on": 1, "off": None})
    results = Results({"device": "d"}, [figures()], [step], {"op": "why"}, ["another"])

    results.write(tmp_path / "results.json")

    assert Results.read(tmp_path / "results.json") == results
    assert json.loads((tmp_path / "results.json").read_text())["ops"][0]["missed"] == []
    assert "| step | 1000.00 | 2500.00 | 2.50 ± 0.25 |" in results.to_markdown()


def test_calls_are_timed_in_turn_after_two_rounds_that_do_not_count():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}

    def seconds(call):
        call()
        return float(len(order))

    taken = in_turn(calls, seconds, rounds=2, prepare=lambda: order.append("prepared"))

    assert order == ["prepared", "a", "prepared", "b"] * 4
    assert taken == {"a": [10.0, 14.0], "b": [12.0, 16.0]}


def test_an_op_moves_its_inputs_and_outputs_once_at_the_least():
    elements = 2 * 16 * 4 * 4
    inputs = AFFINE.inputs(2, 4, torch.float32, torch.device("cpu"))
    outputs = functional.affine_coupling(*inputs)
    with_gradients = replace(AFFINE, with_gradients=True)
    masked = replace(AFFINE, options={"mask": "channel"})

    log_det = 4 * 2
    assert AFFINE.minimum_bytes(inputs, outputs) == 4 * 4 * elements + log_det
    # Forward moves x, h and y; backward x, half of h and dy, and dx and dh.
    assert with_gradients.minimum_bytes(inputs, outputs) == 4 * 10 * elements + 2 * log_det
    assert masked.minimum_bytes(inputs, outputs) == 4 * 3 * elements + log_det


def test_traffic_is_every_pass_of_plain_pytorch():
    x, y = torch.randn(8, 4), torch.randn(1, 4)

    with Traffic() as traffic:
        product = x.view(4, 8).view(8, 4) * y.expand(8, 4)
        product.add_(x)
        torch.empty_like(x)

    assert traffic.bytes == 4 * ((32 + 4 + 32) + (32 + 32 + 32))


def test_glow_has_the_same_loss_and_gradients_with_kernels_and_without():
    images = torch.randn(2, 3, 8, 8)
    flow = revlib.flows.glow((3, 8, 8), levels=2, steps=2, hidden=4)
    gradients = []

    for enabled in (False, True):  # without kernels first: that run initialises ActNorm
        with revlib.use_kernels(enabled):
            loss = flow.nll(images)
            gradients.append([loss.detach(), *torch.autograd.grad(loss, [*flow.parameters()])])

    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)
