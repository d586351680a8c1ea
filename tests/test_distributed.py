"""Data parallelism over two processes gives the gradients of one process."""

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from chains import conv, coupling, mlp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from revlib import AdditiveCoupling, ReversibleSequential, flows, functional

WORLD = 2


class Spare(nn.Linear):
    """A sub-network with a parameter that it does not use."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.spare = nn.Parameter(torch.ones(3))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    chain = ReversibleSequential(coupling(mlp, 3), AdditiveCoupling(Spare(), Spare()))
    return nn.Sequential(nn.Linear(4, 6), chain, ReversibleSequential(coupling(mlp, 3))).double()


def batch() -> Tensor:
    return torch.randn(8, 4, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def loss_of(y: Tensor) -> Tensor:
    return (y.sin() * torch.arange(1.0, 7.0, dtype=y.dtype)).sum(1).mean()


def gradients_of_one_process() -> dict[str, Tensor | None]:
    model = make_model()
    loss_of(model(batch())).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_gradients(model: nn.Module, full: Callable[[Tensor], Tensor] = lambda g: g) -> None:
    for name, want in gradients_of_one_process().items():
        got = dict(model.named_parameters())[name].grad
        got = None if got is None else full(got)
        if want is None:
            assert got is None or not got.any(), name
        else:
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def run_ddp(rank: int, find_unused: bool, static_graph: bool) -> None:
    model = make_model()
    ddp = DistributedDataParallel(
        model, find_unused_parameters=find_unused, static_graph=static_graph
    )
    for _ in range(3):
        ddp.zero_grad()
        loss_of(ddp(batch().chunk(WORLD)[rank])).backward()
        assert_gradients(model)


def run_fsdp(rank: int) -> None:
    model = make_model()
    for chain in model[1:]:
        fully_shard(chain)
    fully_shard(model)
    for _ in range(2):
        model.zero_grad()
        loss_of(model(batch().chunk(WORLD)[rank])).backward()
        assert_gradients(model, lambda gradient: gradient.full_tensor())


def run_fsdp_inside_a_chain(rank: int) -> None:
    model = make_model()
    fully_shard(model[1][0].f)
    with pytest.raises(
        RuntimeError, match=r"module 0\.f inside a ReversibleSequential is sharded"
    ):
        model(batch())


def run_batchnorm(rank: int) -> None:
    torch.manual_seed(0)
    chain = ReversibleSequential(coupling(conv, 2), coupling(conv, 2)).double()
    stored = copy.deepcopy(chain)
    stored.policy = "store"
    x = torch.randn(4, 4, 3, 3, dtype=torch.double)
    for model in (chain, stored):
        ddp = DistributedDataParallel(model)
        ddp(x.chunk(WORLD)[rank]).sin().sum().backward()
    for got, want in zip(chain.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-11)
    for got, want in zip(chain.buffers(), stored.buffers(), strict=True):
        torch.testing.assert_close(got, want)


def make_flow() -> flows.Flow:
    torch.manual_seed(0)
    layers = [
        flows.ActNorm(6),
        flows.AffineCoupling(mlp(3, 6)),
        flows.ActNormConv1x1(6),
        flows.Split(mlp(3, 6)),
        flows.ActNorm(3),
    ]
    return flows.Flow(flows.FlowSequential(*layers)).double()


def flow_batch() -> Tensor:
    """A batch of which every process sees a part with a mean and a variance of its own."""
    x = torch.randn(8, 6, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    return x * torch.linspace(1, 2, 8, dtype=torch.double).view(8, 1) + torch.arange(6.0)


def assert_alike_on_all_ranks(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        tensors = [torch.empty_like(tensor) for _ in range(WORLD)]
        dist.all_gather(tensors, tensor)
        assert torch.equal(*tensors), name


def assert_flow_gradients(
    flow: flows.Flow, whole: flows.Flow, full: Callable[[Tensor], Tensor] = lambda g: g
) -> None:
    """Compares with the gradients of `whole`, which one process computes on the whole batch."""
    whole.zero_grad()
    whole.nll(flow_batch()).backward()
    for (name, got), want in zip(flow.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(
            full(got.grad), want.grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def run_flow_ddp(rank: int) -> None:
    for find_unused in (False, True):
        flow = make_flow()
        ddp = DistributedDataParallel(flow, find_unused_parameters=find_unused)
        for _ in range(2):
            ddp.zero_grad()
            (-ddp(flow_batch().chunk(WORLD)[rank]).mean()).backward()
            assert_alike_on_all_ranks(flow)
            assert_flow_gradients(flow, copy.deepcopy(flow))


def run_actnorm_statistics(rank: int) -> None:
    own = flow_batch().chunk(WORLD)[rank]
    starts = zip(*map(functional.actnorm_init, flow_batch().chunk(WORLD)), strict=True)
    log_scale, bias = (torch.stack(values).mean(0) for values in starts)
    layer = flows.ActNorm(6).double()
    layer(own)
    torch.testing.assert_close(layer.log_scale.detach(), log_scale)
    torch.testing.assert_close(layer.bias.detach(), bias)


def run_flow_from_a_checkpoint_of_one_rank(rank: int) -> None:
    trained = make_flow()
    trained.nll(3 * flow_batch() + 1)
    flow = make_flow()
    if rank == 0:
        flow.load_state_dict(trained.state_dict())
    ddp = DistributedDataParallel(flow)
    (-ddp(flow_batch().chunk(WORLD)[rank]).mean()).backward()
    for got, want in zip(flow.parameters(), trained.parameters(), strict=True):
        assert torch.equal(got, want)
    assert_flow_gradients(flow, trained)


def run_flow_fsdp(rank: int) -> None:
    flow = make_flow()
    with torch.no_grad():
        flow.log_prob(flow_batch())
    whole = copy.deepcopy(flow)
    fully_shard(flow.transform)
    fully_shard(flow)
    for _ in range(2):
        flow.zero_grad()
        (-flow(flow_batch().chunk(WORLD)[rank]).mean()).backward()
        assert_flow_gradients(flow, whole, lambda gradient: gradient.full_tensor())


def run_first_batch_under_fsdp(rank: int) -> None:
    flow = make_flow()
    fully_shard(flow.transform)
    fully_shard(flow)
    with pytest.raises(RuntimeError, match=r"ActNorm.*let a batch pass before fully_shard"):
        flow(flow_batch().chunk(WORLD)[rank])


def worker(rank: int, store: str, run: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    run(rank, *args)
    # A rank that leaves while another still talks to it can bring that one down, and threads
    # of the group that outlive it can abort Python's own clean-up.
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def launch(folder: Path, run: Callable, *args: bool) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.multiprocessing.spawn(worker, (str(folder / "store"), run, args), nprocs=WORLD)


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("static_graph", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("find_unused", [False, True], ids=["", "find_unused_parameters"])
def test_ddp_equals_one_process_where_find_unused_fails_in_most_peers(
    tmp_path, find_unused, static_graph
):
    launch(tmp_path, run_ddp, find_unused, static_graph)


def test_ddp_updates_batchnorm_statistics_as_the_stored_run_does(tmp_path):
    launch(tmp_path, run_batchnorm)


def test_fully_shard_on_whole_chains_equals_one_process(tmp_path):
    launch(tmp_path, run_fsdp)


def test_fully_shard_inside_a_chain_raises(tmp_path):
    launch(tmp_path, run_fsdp_inside_a_chain)


def test_ddp_gives_a_flow_one_start_and_the_gradients_of_one_process(tmp_path):
    launch(tmp_path, run_flow_ddp)


def test_actnorm_starts_from_the_mean_of_all_processes_statistics(tmp_path):
    launch(tmp_path, run_actnorm_statistics)


def test_ddp_hands_a_checkpoint_of_one_rank_to_all_and_actnorm_keeps_it(tmp_path):
    launch(tmp_path, run_flow_from_a_checkpoint_of_one_rank)


def test_fully_shard_on_an_initialized_flow_equals_one_process(tmp_path):
    launch(tmp_path, run_flow_fsdp)


def test_the_first_batch_of_a_sharded_flow_raises_instead_of_being_lost(tmp_path):
    launch(tmp_path, run_first_batch_under_fsdp)
