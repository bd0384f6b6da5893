"""Multilevel under DistributedDataParallel: two processes against one that sees both batches, and what they send.

The processes are started once and go through all cases; every case is a test that looks up how it ended.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
import multiprocessing.connection
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import torch_bregman as tb
from torch_bregman import kernels
from torch_bregman.multilevel import choice

RANKS, STEPS, BATCH = 2, 60, 8

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda groups: tb.LinBreg(groups, lr=0.2),
    "linbreg": lambda groups: tb.LinBreg(groups, lr=0.05, momentum=0.9, momentum_rule="sgd"),
    "adabreg": lambda groups: tb.AdaBreg(groups, lr=0.01),
}
CASES: dict[str, Callable[[], None]] = {}


def case(run: Callable[[], None]) -> Callable[[], None]:
    CASES[run.__name__] = run
    return run


# ---------------------------------------------------------------------- what the cases are made of


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 15), nn.Tanh(), nn.Linear(15, 3))
    return tb.sparse_init_(model, 0.3).to(dtype)


class Units(nn.Module):
    """Filters and rows that die, so that a compact network can do their work; no norms, which see half a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.hidden, self.head = nn.Linear(8, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x)))).mean((2, 3))
        return self.head(F.relu(self.hidden(x)))


class Branches(nn.Module):
    """A layer that is passed by where the first input is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.head = nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.always(x))
        return self.head(self.sometimes(x) if x[0, 0] > 0 else x)


def halves(i: int, shape: tuple[int, ...] = (12,), dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """The batch of step i, a part for each rank."""
    generator = torch.Generator().manual_seed(1000 + i)
    x = torch.randn(RANKS * BATCH, *shape, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 3, (RANKS * BATCH,), generator=generator)
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def make(
    name: str = "adabreg",
    regularizer: Any = None,
    *,
    model: nn.Module | None = None,
    ddp: bool = True,
    options: Any = None,
    **given: Any,
) -> tuple[Any, Any, Any]:
    """A network, alone or in DDP, its optimizer and its levels."""
    model = mlp() if model is None else model
    optimizer = OPTIMIZERS[name](tb.param_groups(model, regularizer or tb.L1(), lam=0.05))
    net = DistributedDataParallel(model, **(options or {})) if ddp else model
    return net, optimizer, tb.Multilevel(net, optimizer, **{"coarse_steps": 9, "fine_steps": 1, **given})


def train(
    parts: tuple[Any, Any, Any], steps: range, *after: Callable[[], Any], whole: bool, clip: float | None = None,
    shape: tuple[int, ...] = (12,),
) -> None:  # fmt: skip
    """On the part of this rank, or on the whole batch."""
    net, optimizer, levels = parts
    dtype = next(net.parameters()).dtype
    for i in steps:
        both = halves(i, shape, dtype)
        x, y = map(torch.cat, zip(*both, strict=True)) if whole else both[dist.get_rank()]
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        if clip is not None:
            norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
            assert norm > clip, "nothing to clip"
        optimizer.step()
        for call in (*after, levels.step):
            call()


def states(optimizer: Any) -> list[Tensor]:
    every = (state for _, state in sorted(optimizer.state_dict()["state"].items()))
    return [value for state in every for _, value in sorted(state.items()) if isinstance(value, Tensor)]


def tensors(parts: tuple[Any, Any, Any]) -> list[Tensor]:
    return [p.detach().clone() for p in parts[0].parameters()] + states(parts[1])


def all_ranks_alike(parts: tuple[Any, Any, Any]) -> None:
    """Weights, state and the place in the cycle, to the last bit."""
    mine = (
        tensors(parts),
        parts[2].restricted,
        dict(parts[2].counts),
        {k: v.kind for k, v in parts[2].choices.items()},
    )
    theirs: list[Any] = [None] * RANKS
    dist.all_gather_object(theirs, mine)
    for other in theirs:
        assert other[1:] == mine[1:]
        assert len(other[0]) == len(mine[0])
        assert all(torch.equal(p, q) for p, q in zip(mine[0], other[0], strict=True))


def close(one: tuple[Any, Any, Any], two: tuple[Any, Any, Any], tolerance: float = 1e-9) -> None:
    for p, q in zip(one[0].parameters(), two[0].parameters(), strict=True):
        assert torch.equal(p != 0, q != 0), "another support"
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    for p, q in zip(states(one[1]), states(two[1]), strict=True):
        torch.testing.assert_close(p, q, rtol=10 * tolerance, atol=tolerance)


@contextlib.contextmanager
def computing(form: str) -> Iterator[None]:
    """Every layer computes with its live weights alone, or with zeros in between, whatever is faster."""
    bound = float("inf") if form == "sparse" else 0.0
    with mock.patch.object(choice, "FASTER", bound), mock.patch.object(choice, "ABLE", bound):
        yield


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """The bytes of each `all_reduce`."""
    sent: list[int] = []
    real = dist.all_reduce

    def count(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return real(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", count):
        yield sent


FORMS = ["masked", "sparse"] if kernels.available() else ["masked"]

# ---------------------------------------------------------------------- the cases


@case
def two_ranks_are_one_process() -> None:
    for form, name, margin, dtype in (
        ("masked", "linbreg", 0.0, torch.float64), ("masked", "adabreg", 1.0, torch.float32),
        ("sparse", "linbreg", 1.0, torch.float32), ("sparse", "adabreg", 0.0, torch.float64),
    ):  # fmt: skip
        if form in FORMS:
            with computing(form):
                options = {"gradient_as_bucket_view": form == "masked", "static_graph": form == "sparse"}
                two = make(name, model=mlp(dtype), margin=margin, options=options)
                one = make(name, model=mlp(dtype), margin=margin, ddp=False)
                train(two, range(STEPS - 3), whole=False)
                near = [part.live.near for part in two[2]._exchange.parts]
                train(two, range(STEPS - 3, STEPS), whole=False)
                train(one, range(STEPS), whole=True)
            assert two[2].counts == {"fine": 6, "coarse": 54}
            assert two[2].choices["0"].kind == ("sparse" if form == "sparse" else "dense")
            assert len(near) == 3
            assert all((some is not None) == (margin > 0) for some in near)
            assert 0.05 < tb.density(two[0]) < 0.9
            all_ranks_alike(two)
            close(one, two, 1e-9 if dtype is torch.float64 else 1e-5)


@case
def in_a_coarse_phase_the_live_gradients_are_sent() -> None:
    torch.manual_seed(0)
    model = tb.sparse_init_(nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 10)), 0.05)
    by_ddp: list[int] = []

    def hook(group, bucket):  # DDP takes no other annotations than its own
        by_ddp.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(group, bucket)

    parts = make(model=model, coarse_steps=4)
    parts[0].register_comm_hook(None, hook)
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    for i in range(11):
        by_ddp.clear()
        restricted, density = parts[2].restricted, tb.density(model)
        with counting() as sent:
            train(parts, range(i, i + 1), whole=False, shape=(400,))
        if restricted:
            assert not by_ddp
            assert len(sent) == 1
            assert density < 0.06
            assert density * dense <= sum(sent) <= 0.08 * dense
        else:
            assert sum(by_ddp) == dense
            assert sent == by_ddp  # which all hooks of DDP call
    all_ranks_alike(parts)


@case
def the_first_rank_decides_by_its_timings() -> None:
    for quick in range(RANKS):  # where sparse layers are faster
        mine = dist.get_rank() == quick

        def seconds(_: Any, key: str, __: Any, mine: bool = mine) -> float:
            return 2.0 if key.endswith("dense") or " dense " in key else 1.0 if mine else 4.0

        with mock.patch.object(choice.Timings, "_time", seconds):
            parts = make(coarse_steps=None)
            train(parts, range(25), whole=False)
        all_ranks_alike(parts)
        assert (parts[2].counts["coarse"] > 0) == (quick == 0)
        if kernels.available():
            assert parts[2].choices["0"].kind == ("sparse" if quick == 0 else "dense")


@case
def gradients_are_accumulated() -> None:
    """With and without no_sync(), which sends nothing; the micro-batches of a step are those of other steps."""
    for quiet in (True, False):
        net, optimizer, levels = two = make(coarse_steps=3)
        one = make(coarse_steps=3, ddp=False)
        for i in range(12):
            optimizer.zero_grad()
            one[1].zero_grad()
            for last, j in enumerate((2 * i, 2 * i + 1)):
                both = halves(j)
                x, y = both[dist.get_rank()]
                restricted = levels.restricted
                with counting() as sent, net.no_sync() if quiet and not last else contextlib.nullcontext():
                    (F.cross_entropy(net(x), y) / 2).backward()
                assert len(sent) == (restricted and (bool(last) or not quiet))
                (
                    F.cross_entropy(one[0](torch.cat([x for x, _ in both])), torch.cat([y for _, y in both])) / 2
                ).backward()
            for parts in (one, two):
                parts[1].step()
                parts[2].step()
        assert levels.counts["coarse"] == 9
        all_ranks_alike(two)
        close(one, two)


@case
def clipping_sees_the_average() -> None:
    two, one = make("linbreg", coarse_steps=3), make("linbreg", coarse_steps=3, ddp=False)
    train(two, range(12), whole=False, clip=0.05)
    train(one, range(12), whole=True, clip=0.05)
    all_ranks_alike(two)
    close(one, two)


@case
def a_scaler_skips_the_step_on_all_ranks() -> None:
    """One rank overflows, in a coarse step and in a fine one."""
    net, optimizer, levels = parts = make(coarse_steps=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    seen = []
    for i in range(12):
        x, y = halves(i)[dist.get_rank()]
        bad = i in (5, 8)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        scaler.scale(loss * (float("inf") if bad and dist.get_rank() == 1 else 1.0)).backward()
        before = tensors(parts)
        scaler.step(optimizer)
        scaler.update()
        assert all(map(torch.equal, before, tensors(parts))) == bad
        seen.append(levels.restricted)
        levels.step()
    assert (seen[5], seen[8]) == (True, False)
    assert scaler.get_scale() == 2.0**8
    all_ranks_alike(parts)


@case
def it_resumes_bit_for_bit() -> None:
    for form in FORMS:
        for stop in (3, 5, 6, 9):
            with computing(form):
                one, two, three = (make(coarse_steps=4, margin=1.0) for _ in range(3))
                train(one, range(12), whole=False)
                train(two, range(stop), whole=False)
                saved = copy.deepcopy([part.state_dict() for part in two])
                for part, state in zip(three, saved, strict=True):
                    part.load_state_dict(state)
                train(three, range(stop, 12), whole=False)
            assert all(map(torch.equal, tensors(one), tensors(three)))
            all_ranks_alike(three)


@case
def no_coarse_steps_are_the_optimizer_bit_for_bit() -> None:
    parts = make(coarse_steps=0)
    twin = make(coarse_steps=0)
    for i in range(8):
        x, y = halves(i)[dist.get_rank()]
        twin[1].zero_grad()
        F.cross_entropy(twin[0](x), y).backward()
        twin[1].step()
    train(parts, range(8), whole=False)
    assert parts[2].counts == {"fine": 8, "coarse": 0}
    assert all(map(torch.equal, tensors(parts), tensors(twin)))


@case
def compact_networks_train_alike() -> None:
    def units() -> nn.Module:
        torch.manual_seed(0)
        model = Units().double()
        for layer in (model.a, model.b, model.hidden):
            layer.weight.data[::2] = 0
        return model

    groups = {"head.*": None, nn.Conv2d: tb.GroupL1("filters"), nn.Linear: tb.GroupL1("rows")}
    with mock.patch.object(choice, "FASTER", float("inf")):
        two = make(regularizer=groups, model=units(), coarse_steps=4)
        one = make(regularizer=groups, model=units(), coarse_steps=4, ddp=False)
        for parts in (one, two):
            for group in parts[1].param_groups:
                group["lam"] = 0.01 if group["lam"] else 0.0
        with counting() as sent:
            train(two, range(14), whole=False, shape=(2, 6, 6))
        train(one, range(14), whole=True, shape=(2, 6, 6))
    assert two[2].choices["(network)"].kind == "compact"
    dense = sum(p.numel() * p.element_size() for p in two[0].parameters())
    assert 0 < max(sent) < 0.7 * dense
    all_ranks_alike(two)
    close(one, two)


@case
def buffers_are_those_of_the_first_rank() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 3)).double()
    parts = make(model=tb.sparse_init_(model, 0.3), coarse_steps=20)
    train(parts, range(9), whole=False)
    assert parts[2].restricted
    held: list[Any] = [None] * RANKS
    dist.all_gather_object(held, model[1].running_mean)
    assert not torch.equal(*held)  # each has seen its own batch
    parts[0](halves(9)[0][0])  # the same batch, after the buffers of the first rank have come
    dist.all_gather_object(held, model[1].running_mean)
    assert torch.equal(*held)


@case
def a_rank_may_evaluate_alone_with_other_weights() -> None:
    for form in FORMS:
        with computing(form):
            parts, twin = make(coarse_steps=6), make(coarse_steps=6)
            train(parts, range(4), whole=False)
            train(twin, range(12), whole=False)
            assert parts[2].restricted
            if dist.get_rank() == 0:
                model, average = parts[0].module, mlp()
                nn.init.normal_(average[0].weight)
                own = [p.detach().clone() for p in model.parameters()]
                x = halves(0)[0][0]
                with torch.no_grad():
                    for p, q in zip(model.parameters(), average.parameters(), strict=True):
                        p.copy_(q)
                    torch.testing.assert_close(model(x), average(x))
                    for p, q in zip(model.parameters(), own, strict=True):
                        p.copy_(q)
            train(parts, range(4, 12), whole=False)
        assert all(map(torch.equal, tensors(parts), tensors(twin)))


@case
def a_phase_that_ends_within_a_step_is_averaged_too() -> None:
    """Weights that come alive elsewhere end it when they are used: then the gradients are those of all weights."""
    for form in FORMS:
        with computing(form):
            two, one = make(coarse_steps=6), make(coarse_steps=6, ddp=False)
            for parts, whole in ((two, False), (one, True)):
                train(parts, range(3), whole=whole)
                assert parts[2].restricted
                with torch.no_grad():
                    next(parts[0].parameters()).add_(0.01)
                train(parts, range(3, 12), whole=whole)
        all_ranks_alike(two)
        close(one, two)


@case
def a_layer_that_one_rank_does_not_use() -> None:
    for form in FORMS:
        with computing(form):
            torch.manual_seed(0)
            model = tb.sparse_init_(Branches().double(), 0.4)
            net, _, levels = parts = make(
                "plain", model=model, coarse_steps=3, options={"find_unused_parameters": True}
            )
            one = make("plain", model=copy.deepcopy(model), coarse_steps=3, ddp=False)
            used = set()
            for i in range(20):
                both = halves(i)
                used.add((levels.restricted, *(bool(torch.tanh(model.always(x))[0, 0] > 0) for x, _ in both)))
                for some in (parts, one):
                    some[1].zero_grad()
                x, y = both[dist.get_rank()]
                F.cross_entropy(net(x), y).backward()
                sum(F.cross_entropy(one[0](x), y) / RANKS for x, y in both).backward()
                for some in (parts, one):
                    some[1].step()
                    some[2].step()
            assert {(True, True, False), (True, False, True), (True, False, False), (False, False, False)} <= used
            all_ranks_alike(parts)
            close(one, parts)


@case
def a_density_is_reached() -> None:
    parts = make(coarse_steps=4)
    control = tb.TargetDensity(parts[1], 0.2, total_steps=40)
    train(parts, range(40), control.step, whole=False)
    assert tb.density(parts[0]) == pytest.approx(0.2, abs=2e-3)
    all_ranks_alike(parts)


@case
def wrong_models_are_named() -> None:
    from torch.distributed.fsdp import fully_shard

    model = mlp()
    net = DistributedDataParallel(model)
    levels = tb.Multilevel(model, OPTIMIZERS["adabreg"](tb.param_groups(model, tb.L1(), lam=0.05)))
    with pytest.raises(ValueError, match=r"inside a DistributedDataParallel; expected that, as in tb.Multilevel\(ddp"):
        net(halves(0)[0][0])
    model(halves(0)[0][0])
    assert not levels.restricted
    model = mlp()
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (RANKS,)))
    optimizer = tb.AdaBreg(model.parameters(), lr=0.01)
    with pytest.raises(
        ValueError, match=r"`model`: its weights are divided among the ranks .* DistributedDataParallel"
    ):
        tb.Multilevel(model, optimizer)


# ---------------------------------------------------------------------- two processes, and the tests


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store, wait = f"file://{folder}/store", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=wait)
    ended: dict[str, str] = {}
    for name, run in CASES.items():
        try:
            run()
            ended[name] = ""
        except BaseException:
            ended[name] = traceback.format_exc()
        Path(folder, f"{rank}.json").write_text(json.dumps(ended))
        if ended[name]:
            raise SystemExit(1)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """How every case ended on each rank: the traceback, or nothing."""
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(rank, str(folder)), daemon=True) for rank in range(RANKS)]
    for worker in workers:
        worker.start()
    multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=400)
    for worker in workers:  # where one has failed the other waits for it in vain
        worker.join(10)
        worker.kill()
    files = [folder / f"{rank}.json" for rank in range(RANKS)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks(name: str, ended: list[dict[str, str]]) -> None:
    for rank, cases in enumerate(ended):
        assert name in cases, "not reached: a case before it failed"
        assert not cases[name], f"on rank {rank}:\n{cases[name]}"
