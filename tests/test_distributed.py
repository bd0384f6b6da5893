"""Several processes give what one gives, with the same global batch."""

import warnings

import pytest
import torch
import torch.distributed as dist
from distributed_cases import REGULARIZERS, Case, controlled, difference, initialised, network, place, run, start

import torch_bregman as tb
from torch_bregman.control import threshold_for, threshold_over_ranks
from torch_bregman.distributed import Spread, local

CASES = [Case(optimizer, reg) for optimizer in ("LinBreg", "AdaBreg") for reg in REGULARIZERS] + [
    Case("ProxSGD", "l1"), Case("ProxSGD", "columns, channels"), Case("ProxSGD", "nuclear"),
]  # fmt: skip
CONTROLS = ("exact", "feedback", "groups", "sparse groups", "prune")


# ---------------------------------------------------------------------- what every rank does


def on_fully_shard():
    quiet()
    return {
        "trainings": {str(case): run(case, "fsdp") for case in CASES},
        "controls": {name: controlled(name, "fsdp") for name in CONTROLS},
        "initialised": {str(groups): initialised(groups, "fsdp") for groups in (None, "columns")},
        "thresholds": thresholds(),
        "refusals": refusals(),
    }


def quiet():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*_register_pre_backward_hook.*")


def thresholds():
    """(kept, over the ranks, in one piece) for values with ties, some of them DTensors and some on every rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    numbers = torch.Generator().manual_seed(0)
    found = []
    for dtype in (torch.float32, torch.float64):
        for ties in (1, 5):
            values = torch.rand(3, 41, generator=numbers, dtype=dtype) * 1.5
            values = (values * 20 // ties * ties / 20).unbind()
            n = dist.get_world_size()
            line = init_device_mesh("cpu", (n,))
            square = init_device_mesh("cpu", (2, n // 2))
            held = [
                distribute_tensor(values[0], line, [Shard(0)]), values[1],
                distribute_tensor(values[2], square, [Shard(0), Replicate()]),
            ]  # fmt: skip
            spread = Spread([local(t) for t in held], held)
            for kept in range(0, 124, 3):
                found.append([threshold_over_ranks(spread, kept), threshold_for(torch.cat(values), kept)])
    return found


def refusals():
    """The errors that name what cannot be done, and what to do."""
    model = network()
    place(model, "fsdp")
    attempts = {
        "generator": lambda: tb.sparse_init_(model, 0.1),
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


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return start(on_fully_shard, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.optimizer}-{case.regularizer}")
def test_the_same_training(two_ranks, case):
    expected = run(case, "one")
    for found in two_ranks:
        assert difference(found["trainings"][str(case)], expected) < 1e-9
    kept = torch.cat([x.flatten() for name, x in expected.items() if name.endswith("weight")]).count_nonzero()
    assert kept > 20


@pytest.mark.parametrize("name", CONTROLS)
def test_target_density(two_ranks, name):
    expected = controlled(name, "one")
    for found in two_ranks:
        assert difference(found["controls"][name], expected) < 1e-9
        assert torch.equal(found["controls"][name][": density"], expected[": density"])


def test_thresholds_are_those_of_one_process(two_ranks):
    for found in two_ranks:
        assert len(found["thresholds"]) == 168
        for spread, together in found["thresholds"]:
            assert spread == together


@pytest.mark.parametrize("groups", [None, "columns"])
def test_sparse_init_and_report(two_ranks, groups):
    expected = initialised(groups, "one")
    for found in two_ranks:
        ours = found["initialised"][str(groups)]
        assert all(torch.equal(ours["weights"][name], x) for name, x in expected["weights"].items())
        assert ours["report"] == expected["report"]
        assert ours["density"] == expected["density"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("generator", "manual_seed")],
)
def test_refusals_name_the_remedy(two_ranks, name, words):
    for found in two_ranks:
        assert words in found["refusals"][name]
