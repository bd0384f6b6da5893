"""Several processes give what one gives, with the same global batch.

Processes are dear to start, so a few of them do everything, and the tests look at what came of it.
"""

import re
import warnings

import pytest
import torch
import torch.distributed as dist
from distributed_cases import (
    REGULARIZERS,
    SAVED,
    Case,
    controlled,
    difference,
    initialised,
    network,
    place,
    resumed,
    run,
    saved,
    start,
    taken_over,
    uninterrupted,
    with_zero,
)
from torch import nn

import torch_bregman as tb
from torch_bregman.control import threshold_for, threshold_over_ranks
from torch_bregman.distributed import Spread, local

TWO = [("fsdp", "LinBreg"), ("fsdp", "AdaBreg"), ("fsdp", "ProxSGD"), ("tp", "AdaBreg")]
FOUR = [("ddp", "LinBreg"), ("fsdp", "AdaBreg"), ("hsdp", "LinBreg"), ("tp", "AdaBreg")]
CONTROLS = ("exact", "feedback", "groups", "sparse groups", "prune")


# ---------------------------------------------------------------------- what every rank does


def quiet():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    for category in (DeprecationWarning, FutureWarning):  # of torch's own older parts
        warnings.filterwarnings("ignore", category=category)


def on_four_ranks(folder):
    quiet()
    return {
        "trainings": trainings(FOUR),
        "controls": {how: controlled("groups", how) for how in ("ddp", "hsdp", "tp")},
        "initialised": {how: initialised("rows", how) for how in ("hsdp", "tp")},
        "thresholds": thresholds(),
        "saved": saved("hsdp", folder),
    }


def on_two_ranks(folder):
    quiet()
    full = saved("fsdp", folder)
    return {
        "saved": full,
        "refusals": refusals(folder.parent),
        "zero": with_zero("zero"),
        "trainings": trainings(TWO),
        "controls": {name: controlled(name, "fsdp") for name in CONTROLS},
        "initialised": {str(groups): initialised(groups, "fsdp") for groups in (None, "columns")},
        "thresholds": thresholds(),
        "resumed": {"from full": resumed("fsdp", folder, full), "from one process": taken_over("fsdp")},
    }


def on_other_ranks(folder, full):
    """What was saved on another number of ranks goes on."""
    quiet()
    return {"resumed": {"from parts": resumed("fsdp", folder), "from full": resumed("fsdp", folder, full)}}


def trainings(chosen):
    return {f"{how} {optimizer}": run(Case(optimizer), how) for how, optimizer in chosen}


def thresholds():
    """(over the ranks, in one piece) for values with ties, some of them DTensors and some on every rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    numbers = torch.Generator().manual_seed(0)
    n = dist.get_world_size()
    line, square = init_device_mesh("cpu", (n,)), init_device_mesh("cpu", (2, n // 2))
    found = []
    for dtype in (torch.float32, torch.float64):
        for ties in (1, 5):
            values = torch.rand(3, 41, generator=numbers, dtype=dtype) * 1.5
            values = (values * 20 // ties * ties / 20).unbind()
            held = [
                distribute_tensor(values[0], line, [Shard(0)]), values[1],
                distribute_tensor(values[2], square, [Shard(0), Replicate()]),
            ]  # fmt: skip
            spread = Spread([local(t) for t in held], held)
            for kept in range(0, 124, 3):
                found.append([threshold_over_ranks(spread, kept), threshold_for(torch.cat(values), kept)])
    return found


def refusals(folder):
    """The errors that name what cannot be done, and what to do."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, plain = network(), network()
    place(model, "fsdp")
    groups = tb.param_groups(model, lam=0.1)
    flat = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    zero = ZeroRedundancyOptimizer(plain.parameters(), optimizer_class=tb.AdaBreg, regularizer=tb.L1(), lam=0.1)
    attempts = {
        "generator": lambda: tb.sparse_init_(model, 0.1),
        "fused": lambda: tb.LinBreg(groups, fused=True),
        "lam": lambda: tb.LinBreg(model[5].parameters(), regularizer=tb.L1(), lam=torch.ones(27)),
        "levels": lambda: tb.Multilevel(model, tb.LinBreg(groups)),
        "shrink": lambda: tb.shrink(model, (torch.zeros(1, 2, 6, 6),)),
        "save_sparse": lambda: tb.save_sparse(model, folder / "never.safetensors"),
        "zero": lambda: tb.TargetDensity(zero, 0.1),
        "flat": lambda: tb.LinBreg(flat.parameters(), regularizer=tb.GroupL1("rows"), lam=0.1),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "no error"
        except ValueError as error:
            found[name] = str(error)
    return found


# ---------------------------------------------------------------------- what came of it


def started(function, world, folder):
    ranks = start(function, world, folder, folder / "checkpoint")
    ranks[0]["folder"] = folder
    return ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return started(on_two_ranks, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return started(on_four_ranks, 4, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def one():
    return {optimizer: run(Case(optimizer), "one") for optimizer in ("LinBreg", "AdaBreg", "ProxSGD")}


def check_training(ranks, one, how, optimizer, regularizer):
    expected = one[optimizer][regularizer]
    for found in ranks:
        assert difference(found["trainings"][f"{how} {optimizer}"][regularizer], expected) < 1e-9
    weights = [x for name, x in expected.items() if name.endswith("weight")]
    assert any(0 < x.count_nonzero() < x.numel() for x in weights) or "nuclear" in regularizer


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize(("how", "optimizer"), TWO)
def test_the_same_training_on_two_ranks(two_ranks, one, how, optimizer, regularizer):
    check_training(two_ranks, one, how, optimizer, regularizer)


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize(("how", "optimizer"), FOUR)
@pytest.mark.slow
def test_the_same_training_on_four_ranks(four_ranks, one, how, optimizer, regularizer):
    check_training(four_ranks, one, how, optimizer, regularizer)


def test_zero_redundancy_optimizer(two_ranks):
    expected = with_zero("one")
    for found in two_ranks:
        assert difference(found["zero"], expected) < 1e-9


@pytest.mark.parametrize("name", CONTROLS)
def test_target_density(two_ranks, name):
    check_control(two_ranks, name, name)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "hsdp", "tp"])
def test_target_density_counts_copies_once(four_ranks, how):
    check_control(four_ranks, how, "groups")


def check_control(ranks, key, name):
    expected = controlled(name, "one")
    for found in ranks:
        assert difference(found["controls"][key], expected) < 1e-9
        assert torch.equal(found["controls"][key][": density"], expected[": density"])


def test_thresholds_are_those_of_one_process(two_ranks):
    check_thresholds(two_ranks)


@pytest.mark.slow
def test_thresholds_on_a_square(four_ranks):
    check_thresholds(four_ranks)


def check_thresholds(ranks):
    for found in ranks:
        assert len(found["thresholds"]) == 168
        for spread, together in found["thresholds"]:
            assert spread == together


@pytest.mark.parametrize("groups", [None, "columns"])
def test_sparse_init_and_report(two_ranks, groups):
    check_initialised(two_ranks, str(groups), groups)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hsdp", "tp"])
def test_sparse_init_and_report_on_a_square(four_ranks, how):
    check_initialised(four_ranks, how, "rows")


def check_initialised(ranks, key, groups):
    expected = initialised(groups, "one")
    for found in ranks:
        ours = found["initialised"][key]
        assert all(torch.equal(ours["weights"][name], x) for name, x in expected["weights"].items())
        assert ours["report"] == expected["report"]
        assert ours["density"] == expected["density"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_two_ranks_goes_on_with_one(two_ranks):
    folder = two_ranks[0]["folder"] / "checkpoint"
    check_resumed([{"from parts": resumed("one", folder), "from full": resumed("one", folder, two_ranks[0]["saved"])}])
    check_resumed([found["resumed"] for found in two_ranks])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_four_ranks_goes_on_with_two_and_one(four_ranks, tmp_path):
    folder = four_ranks[0]["folder"] / "checkpoint"
    check_resumed([{"from parts": resumed("one", folder)}])
    two = start(on_other_ranks, 2, tmp_path, folder, four_ranks[0]["saved"])
    check_resumed([found["resumed"] for found in two])


def check_resumed(ranks):
    expected = uninterrupted()
    for found in ranks:
        for ours in found.values():
            for name in SAVED.regularizers:
                assert difference(ours[name], expected[name]) < 1e-9


@pytest.mark.parametrize("regularizer", [tb.L1(), tb.NuclearNorm(prox_every=2)], ids=repr)
def test_asking_for_the_state_before_the_first_step_moves_nothing(regularizer):
    """torch.distributed.checkpoint creates the state by a step with lr 0 and no gradients."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = network()
    if isinstance(regularizer, tb.NuclearNorm):
        model = nn.Sequential(nn.Linear(4, 4, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.eye(4).fill_diagonal_(0).index_fill(0, torch.tensor(0), 0.5))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = tb.AdaBreg(tb.param_groups(model, regularizer, lam=0.1), lr=1e-2)
    state = get_optimizer_state_dict(model, optimizer)["state"]
    for old, (name, p) in zip(before, model.named_parameters(), strict=True):
        assert torch.allclose(p, old, rtol=0, atol=1e-15)
        assert not torch.any(state[name]["exp_avg"])
        assert torch.equal(state[name]["dual"] != 0, old != 0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("generator", "manual_seed"),
        ("fused", "leave it None"),
        ("lam", "one number for a DTensor"),
        ("levels", "DistributedDataParallel"),
        ("shrink", "full_state_dict=True"),
        ("save_sparse", "full_state_dict=True"),
        ("zero", "ZeroRedundancyOptimizer.*fully_shard"),
        ("flat", "torch.distributed.fsdp.fully_shard"),
    ],
)
def test_refusals_name_the_remedy(two_ranks, name, words):
    for found in two_ranks:
        assert re.search(words, found["refusals"][name])
