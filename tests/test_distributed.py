"""Several processes give what one gives, with the same global batch."""

import warnings

import pytest
from distributed_cases import REGULARIZERS, Case, difference, run, start

CASES = [Case(optimizer, reg) for optimizer in ("LinBreg", "AdaBreg") for reg in REGULARIZERS] + [
    Case("ProxSGD", "l1"), Case("ProxSGD", "columns, channels"), Case("ProxSGD", "nuclear"),
]  # fmt: skip


def trainings(how):
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*_register_pre_backward_hook.*")
    return {str(case): run(case, how) for case in CASES}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return start(trainings, 2, tmp_path_factory.mktemp("ranks"), "fsdp")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.optimizer}-{case.regularizer}")
def test_fully_shard(two_ranks, case):
    expected = run(case, "one")
    for found in two_ranks:
        assert difference(found[str(case)], expected) < 1e-9
    kept = [(x != 0).double().mean().item() for name, x in expected.items() if name.endswith("weight")]
    assert 0 < sum(kept) / len(kept) < 1 or "nuclear" in case.regularizer
