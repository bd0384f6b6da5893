"""Small trainings that give the same weights on one process and on several; test_distributed.py and
benchmarks/distributed.py start them.
"""

from __future__ import annotations

import copy
import datetime
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.functional import mse_loss

import torch_bregman as tb
from torch_bregman.distributed import Shards, assign, is_sharded, local

BATCH = 8

REGULARIZERS = {
    "l1": tb.L1(),
    "nonnegative": tb.NonNegativeL1(),
    "rows, kernels": {nn.Linear: tb.GroupL1("rows"), nn.Conv2d: tb.GroupL1("kernels")},
    "columns, filters": {nn.Linear: tb.GroupL1("columns"), nn.Conv2d: tb.GroupL1("filters")},
    "columns, channels": {nn.Linear: tb.GroupL1("columns"), nn.Conv2d: tb.GroupL1("channels")},
    "sparse rows, kernels": {nn.Linear: tb.SparseGroupL1("rows"), nn.Conv2d: tb.SparseGroupL1("kernels")},
    "sparse rows, filters": {nn.Linear: tb.SparseGroupL1("rows"), nn.Conv2d: tb.SparseGroupL1("filters")},
    "sparse columns, channels": {nn.Linear: tb.SparseGroupL1("columns"), nn.Conv2d: tb.SparseGroupL1("channels")},
    "index": {"5": tb.SparseGroupL1(torch.arange(7 * 27).view(7, 27) % 11), "*.weight": tb.L1()},
    "nuclear": tb.NuclearNorm(),
    "nuclear, every 5": tb.NuclearNorm(prox_every=5),
}


class Case(NamedTuple):
    """One training of a network per regulariser, side by side: starting and stepping processes is what takes time."""

    optimizer: str
    steps: int = 10
    dtype: torch.dtype = torch.float64
    regularizers: tuple[str, ...] = tuple(REGULARIZERS)


class Networks(nn.Module):
    """Independent networks that get the same input."""

    def __init__(self, names: tuple[str, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.each = nn.ModuleDict({name: network(dtype) for name in names})

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [net(x) for net in self.each.values()]


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Convolutions and Linear layers with 5, 3, 7 and 2 rows, which no number of ranks divides."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Conv2d(5, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 7), nn.Tanh(),
        nn.Linear(7, 2),
    )  # fmt: skip
    tb.sparse_init_(model, 0.3, generator=torch.Generator().manual_seed(1), nonlinearity="tanh")
    with torch.no_grad():
        for layer in tb.layers.weight_layers(model):  # some groups of every kind start dead
            layer.weight[-1], layer.weight[:, 0] = 0, 0
    return model.to(dtype)


def batch(step: int, part: int, parts: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Its share of the global batch of this step, for one of `parts` equal parts."""
    numbers = torch.Generator().manual_seed(step % 5)
    x = torch.randn(BATCH, 2, 6, 6, generator=numbers, dtype=torch.float64).to(dtype)
    y = torch.stack([x[:, 0].mean((1, 2)), x[:, 1, 0, 0]], 1)
    share = slice(part * BATCH // parts, (part + 1) * BATCH // parts)
    return x[share], y[share]


def place(model: nn.Module, how: str) -> tuple[nn.Module, int, int]:
    """The model as one of "one", "ddp", "fsdp", "hsdp", "tp", and which part of how many of the data is this rank's."""
    if how == "one":
        return model, 0, 1
    rank, world = dist.get_rank(), dist.get_world_size()
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model), rank, world
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if how == "tp":  # the Linear layers are cut twice, the convolutions once
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
        # Whole activations in between: tensor parallelism cannot pass on parts of unequal size.
        plan = {
            "5": ColwiseParallel(output_layouts=Replicate()),
            "7": RowwiseParallel(input_layouts=Replicate()),
        }
        for net in model.each.values() if isinstance(model, Networks) else [model]:
            parallelize_module(net, mesh["tensor"], plan)
        return fully_shard(model, mesh=mesh["data"]), mesh.get_local_rank("data"), world // 2
    shape = (2, world // 2) if how == "hsdp" else (world,)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    return fully_shard(model, mesh=mesh), rank, world


def make(case: Case, model: Networks) -> tb.optim.BregmanOptimizer:
    groups = []
    for name, net in model.each.items():
        groups += tb.param_groups(net, REGULARIZERS[name], lam=0.3 if "nuclear" in name else 0.2)
    if case.optimizer == "LinBreg":
        return tb.LinBreg(groups, lr=0.03, momentum=0.9, momentum_rule="sgd", weight_decay=1e-3)
    if case.optimizer == "AdaBreg":
        return tb.AdaBreg(groups, lr=5e-3, delta=1.5)
    return tb.ProxSGD(groups, lr=0.05, momentum=0.5)


def whole(t: torch.Tensor) -> torch.Tensor:
    return (Shards.of(t).whole(local(t).detach()) if is_sharded(t) else t.detach()).clone()


@torch.no_grad()
def halve_first_row(model: nn.Module) -> None:
    """An edit from outside that only the rank which holds the first rows sees."""
    for p in model.parameters():
        factor = torch.ones(p.shape, dtype=p.dtype)
        factor[0] = 0.5
        local(p).mul_(Shards.of(p).part(factor) if is_sharded(p) else factor)


def train(model: nn.Module, optimizer, steps: range, part: int, parts: int, control=None) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        x, y = batch(step, part, parts, dtype)
        optimizer.zero_grad()
        found = model(x)
        sum(mse_loss(z, y) for z in (found if isinstance(found, list) else [found])).backward()
        with warnings.catch_warnings():  # the nuclear norm makes low rank: its weights start dense
            warnings.filterwarnings("ignore", ".*start more than half dense")
            optimizer.step()
        if control is not None:
            control.step()


def run(case: Case, how: str) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and state after the training, as whole tensors, for each regulariser."""
    inner = Networks(case.regularizers, case.dtype)
    model, part, parts = place(inner, how)
    optimizer = make(case, inner)
    train(model, optimizer, range(case.steps // 2), part, parts)
    halve_first_row(inner)
    train(model, optimizer, range(case.steps // 2, case.steps), part, parts)
    return all_results(inner, optimizer)


def all_results(model: Networks, optimizer) -> dict[str, dict[str, torch.Tensor]]:
    return {name: results(net, optimizer) for name, net in model.each.items()}


def results(model: nn.Module, optimizer) -> dict[str, torch.Tensor]:
    found = {name: whole(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for key, x in optimizer.state[p].items():
            found[f"{name}: {key}"] = whole(x) if isinstance(x, torch.Tensor) else torch.tensor(x)
    return found


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], *, state: bool = True) -> float:
    """The largest difference relative to the largest entry of its tensor; infinite where a support differs.

    Without `state` it is that of the weights alone.
    """
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for name, a in ours.items():
        if ": " in name and not state:
            continue
        b = theirs[name]
        if ": " not in name and not torch.equal(a != 0, b != 0):
            return float("inf")
        if "written" not in name:  # sums of bits
            here = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
            worst = here if not here <= worst else worst  # also a NaN
    return worst


def controlled(name: str, how: str) -> dict[str, torch.Tensor]:
    """A training with a `TargetDensity`: weights, λ after every step, the density at the end."""
    reg, mode, lam = {
        "exact": (tb.L1(), "exact", 0.0),
        "feedback": (tb.L1(), "feedback", 0.05),
        "groups": (REGULARIZERS["columns, channels"], "exact", 0.02),
        "sparse groups": (REGULARIZERS["sparse columns, channels"], "feedback", 0.0),
        "prune": (tb.L1(), "feedback", 1e-3),
    }[name]
    inner = network()
    model, part, parts = place(inner, how)
    groups = tb.param_groups(inner, reg, lam=lam)
    optimizer = tb.ProxSGD(groups, lr=0.05) if name == "prune" else tb.AdaBreg(groups, lr=5e-3)
    control = tb.TargetDensity(optimizer, 0.4 if name == "groups" else 0.2, mode, total_steps=12, every=3)
    lams = []
    for step in range(12):
        train(model, optimizer, range(step, step + 1), part, parts, control)
        lams.append(optimizer.param_groups[0]["lam"])
    found = {name: whole(p) for name, p in inner.named_parameters()}
    return {**found, ": lam": torch.tensor(lams), ": density": torch.tensor([control.density, tb.density(inner)])}


def with_zero(how: str) -> dict[str, torch.Tensor]:
    """A training with AdaBreg, and on several ranks with a share of its state on each."""
    inner = network()
    groups = tb.param_groups(inner, tb.L1(), lam=0.05)
    if how == "one":
        optimizer = tb.AdaBreg(groups, lr=5e-3)
        model, part, parts = inner, 0, 1
    else:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=tb.AdaBreg, lr=5e-3)
        model, part, parts = place(inner, "ddp")
    train(model, optimizer, range(10), part, parts)
    return {name: whole(p) for name, p in inner.named_parameters()}


SAVED = Case("AdaBreg", 7, regularizers=("l1", "sparse columns, channels", "nuclear, every 5"))


def saved(how: str, folder: Path) -> dict:
    """A training that is saved by torch.distributed.checkpoint; its whole state in one piece."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    inner = Networks(SAVED.regularizers, SAVED.dtype)
    model, part, parts = place(inner, how)
    optimizer = make(SAVED, inner)
    train(model, optimizer, range(SAVED.steps), part, parts)
    weights, state = get_state_dict(inner, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    weights, state = get_state_dict(inner, optimizer, options=StateDictOptions(full_state_dict=True))
    return {"model": weights, "optimizer": state}


def resumed(how: str, folder: Path, full: dict | None = None) -> dict[str, dict[str, torch.Tensor]]:
    """The second half of a training, from what `saved` left in `folder`, or from the `full` state."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    inner = Networks(SAVED.regularizers, SAVED.dtype)
    model, part, parts = place(inner, how)
    with torch.no_grad():
        for p in inner.parameters():
            local(p).zero_()
    optimizer = make(SAVED, inner)
    if full is None:
        weights, state = get_state_dict(inner, optimizer)
        held = {"model": weights, "optimizer": state}
        checkpoint.load(held, checkpoint_id=folder, no_dist=how == "one")
        options = StateDictOptions()
    else:
        held, options = copy.deepcopy(full), StateDictOptions(full_state_dict=True)  # torch puts DTensors into it
    set_state_dict(
        inner, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"], options=options
    )
    train(model, optimizer, range(SAVED.steps, 2 * SAVED.steps), part, parts)
    return all_results(inner, optimizer)


def taken_over(how: str) -> dict[str, dict[str, torch.Tensor]]:
    """The second half of a training whose first half one process did, from the `state_dict()` of its optimizer."""
    alone, inner = Networks(SAVED.regularizers, SAVED.dtype), Networks(SAVED.regularizers, SAVED.dtype)
    first = make(SAVED, alone)
    train(alone, first, range(SAVED.steps), 0, 1)
    model, part, parts = place(inner, how)
    with torch.no_grad():
        for p, q in zip(inner.parameters(), alone.parameters(), strict=True):
            assign(p, q)
    optimizer = make(SAVED, inner)
    optimizer.load_state_dict(first.state_dict())
    train(model, optimizer, range(SAVED.steps, 2 * SAVED.steps), part, parts)
    return all_results(inner, optimizer)


def uninterrupted() -> dict[str, dict[str, torch.Tensor]]:
    model = Networks(SAVED.regularizers, SAVED.dtype)
    optimizer = make(SAVED, model)
    train(model, optimizer, range(2 * SAVED.steps), 0, 1)
    return all_results(model, optimizer)


def initialised(groups: str | None, how: str) -> dict:
    """`sparse_init_` of a model that is placed already, and its report."""
    inner = network()
    place(inner, how)
    tb.sparse_init_(inner, 0.2, groups, torch.Generator().manual_seed(7))
    weights = {name: whole(p) for name, p in inner.named_parameters()}
    return {"weights": weights, "report": str(tb.sparsity_report(inner, rank=True)), "density": tb.density(inner)}


# ---------------------------------------------------------------------- processes


def start(work, world: int, folder: Path, *args, timeout: float = 600) -> list:
    """What `work(*args)` returns on each of `world` ranks. A rank that fails shows its traceback.

    Once in some dozens of runs a collective of gloo was seen that never returned, in a forward pass under tensor
    parallelism before any of our code; so a time-out is tried again, once.
    """
    try:
        return _start(work, world, folder, *args, timeout=timeout)
    except mp.ProcessRaisedException as error:
        if not any(said in str(error) for said in ("Timed out", "Connection closed by peer")):
            raise
        return _start(work, world, folder / "again", *args, timeout=timeout)


def _start(work, world: int, folder: Path, *args, timeout: float) -> list:
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.spawn(_rank, (world, folder, work, args), nprocs=world, join=False)
    end = time.monotonic() + timeout
    try:
        while not context.join(timeout=5):
            if time.monotonic() > end:
                raise TimeoutError(f"{work.__name__} on {world} ranks took over {timeout} s.")
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _rank(rank: int, world: int, folder: Path, work, args) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world,
        timeout=datetime.timedelta(minutes=2),
    )  # fmt: skip
    torch.save(work(*args), folder / f"{rank}.pt")
    dist.destroy_process_group()
