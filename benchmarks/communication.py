"""What the ranks of a data-parallel run send in a step, and what each holds: counted, not timed.

    unshare -n sh -c 'ip link set lo up && python benchmarks/communication.py [--ranks 1 2 4]'

The MLP 784-4096-4096-10 under DistributedDataParallel (gloo), a process for each rank on this machine. "payload" is
what is handed to all_reduce in a step, per rank; "wire" is what a ring sends for it, 2(N − 1)/N of it per rank;
"loopback" is what went through the loopback device in that step, over N. In a network namespace of its own, as above,
nobody else uses the device; without it others' traffic is counted too.

Random weights are alive, and v is drawn so that as many entries lie beyond 0.8 λ, as in a run that has settled. Layers
compute with their live weights alone, whatever is faster. "kept" is the state of the full space, which waits during a
coarse phase. What DDP's reducer holds (buckets, as large as the dense gradients) comes on top everywhere.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import torch_bregman as tb
from torch_bregman.models import mlp
from torch_bregman.multilevel.choice import Timings

RESULT = Path(__file__).parent / "results" / "communication.json"
LAM, BATCH = 1.0, 4


def size(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors among them."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def loopback() -> int:
    """Bytes that the loopback device has sent so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next((int(line.split()[9]) for line in lines if line.strip().startswith("lo:")), 0)


def network(density: float) -> nn.Module:
    torch.manual_seed(0)
    model = mlp((1, 28, 28), 10, hidden=(4096, 4096))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1 and density < 1:
                p.mul_(torch.rand_like(p) < density)
    return model


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    if name == "Adam":
        return torch.optim.Adam(model.parameters(), lr=1e-6)
    groups = tb.param_groups(model, tb.L1(), lam=LAM)
    return tb.LinBreg(groups, lr=1e-6) if name == "LinBreg" else tb.AdaBreg(groups, lr=1e-6)


def draw_duals(optimizer: torch.optim.Optimizer, density: float) -> None:
    """Off the support: beyond 0.8 λ a share of `density`, below it the others."""
    for p in optimizer.param_groups[0]["params"]:
        dual = optimizer.state[p]["dual"]
        near, size = torch.rand_like(dual) < density, torch.rand_like(dual)
        dual.copy_(torch.where(p != 0, dual, LAM * torch.where(near, 0.8 + 0.19 * size, 0.8 * size)))


def one_step(net: DistributedDataParallel, optimizer: Any) -> dict[str, int]:
    """Forward and backward, and what was sent."""
    sent: list[int] = []
    real = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(size([tensor]))
        return real(tensor, *args, **kwargs)

    generator = torch.Generator().manual_seed(dist.get_rank())
    x, y = torch.rand(BATCH, 1, 28, 28, generator=generator), torch.randint(0, 10, (BATCH,), generator=generator)
    optimizer.zero_grad()
    dist.barrier()
    before = loopback()
    with mock.patch.object(dist, "all_reduce", counted):
        F.cross_entropy(net(x), y).backward()
    dist.barrier()
    ranks = dist.get_world_size()
    through = (loopback() - before) // ranks
    payload = sum(sent)
    return {"payload": payload, "wire": 2 * (ranks - 1) * payload // ranks, "loopback": through}


def held(model: nn.Module, optimizer: torch.optim.Optimizer, levels: Any = None) -> dict[str, int]:
    """Bytes of what a rank holds, from the tensors themselves; after a step, with its gradients."""
    parts = [] if levels is None else levels._exchange.parts
    values = [part.live.values for part in parts]
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    index = {}
    for part in parts:
        for where in (part.live.where, part.live.pattern, part.live.near):
            if where is not None:
                made = where.__dict__  # the lists that the products have asked for
                for t in itertools.chain([where.index], *made.get("lists", ()), made.get("rows", ())):
                    index[id(t)] = t
    return {
        "weights": size([*model.parameters(), *values]),
        "gradients": size(p.grad for p in {*model.parameters(), *trained}),
        "state": size(value for p in trained for value in optimizer.state[p].values()),
        "kept": size(value for part in parts for value in part.held.values()),
        "index": size(index.values()),
    }


def measure(name: str, density: float, margin: float | None) -> dict[str, Any]:
    """A fine step, or with a margin the coarse one after it."""
    model = network(density)
    optimizer = optimizer_of(name, model)
    net = DistributedDataParallel(model)
    net.register_comm_hook(None, allreduce_hook)
    about = {"method": name, "density": density, "margin": margin}
    levels = None if margin is None else tb.Multilevel(net, optimizer, coarse_steps=9, margin=margin)
    sent = one_step(net, optimizer)
    optimizer.step()
    if levels is None:
        return {**about, **sent, **held(model, optimizer)}
    draw_duals(optimizer, density)
    levels.step()
    return {**about, **one_step(net, optimizer), **held(model, optimizer, levels)}


def work(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    wait = datetime.timedelta(minutes=10)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=wait)
    cases: list[tuple[str, float, float | None]] = [(name, 1.0, None) for name in ("SGD", "Adam")]
    cases += [(name, 0.05, margin) for name in ("LinBreg", "AdaBreg") for margin in (None, 0.0, 1.0)]
    cases += [("AdaBreg", density, margin) for density in (0.02, 0.01) for margin in (0.0, 1.0)]
    with mock.patch.object(Timings, "_time", lambda _, key, __: 2.0 if " dense" in key else 1.0):
        rows = [measure(*case) for case in cases]
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def table(rows: list[dict[str, Any]]) -> str:
    """Megabytes."""
    columns = ["payload", "wire", "loopback", "weights", "gradients", "state", "kept", "index"]
    lines = [
        f"{'ranks':>5}  {'method':8} {'density':>7} {'margin':>6} {'phase':10}" + "".join(f"{c:>11}" for c in columns)
    ]
    for row in rows:
        step = "all weights" if row["margin"] is None else f"coarse, {row['density']:.0%}, margin {row['margin']:g}"
        numbers = "".join(f"{row[c] / 1e6:11.2f}" for c in columns)
        lines.append(f"{row['ranks']:>5}  {row['method']:8} {step:20}{numbers}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    rows = []
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(work, args=(ranks, folder), nprocs=ranks)
            rows += [{"ranks": ranks, **row} for row in json.loads(Path(folder, "rows.json").read_text())]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, gloo"
    args.out.write_text(json.dumps({"machine": machine, "network": "784-4096-4096-10", "rows": rows}, indent=1) + "\n")
    print(f"{machine}; MB per rank and step\n\n{table(rows)}")


if __name__ == "__main__":
    main()
