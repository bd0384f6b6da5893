"""How far several processes are from one, with the same global batch: weights, v and moments after a training.

    python benchmarks/distributed.py [--ranks 2 4] [--steps 200] [--ways ddp fsdp hsdp tp]

A cell is the largest difference, relative to the largest entry of its tensor: of the weights, and in brackets with v,
momentum and moments. It is "support" where a weight is zero here and not there. Small networks with Conv and Linear
layers of 5, 3, 7 and 2 rows, so that parts are unequal and some are empty; half-way through, weights are changed from
outside. ddp: DistributedDataParallel. fsdp: fully_shard on a line. hsdp: on a square of copies and parts. tp: tensor
parallelism within fully_shard, Linear weights cut twice.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from distributed_cases import REGULARIZERS, Case, difference, run, start

WAYS = ["ddp", "fsdp", "hsdp", "tp"]
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--optimizers", nargs="+", default=["LinBreg", "AdaBreg"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    options = parser.parse_args()
    print(f"torch {torch.__version__}, gloo, {options.steps} steps", flush=True)
    for name in options.dtypes:
        cases = [Case(optimizer, options.steps, DTYPES[name]) for optimizer in options.optimizers]
        expected = {case.optimizer: run(case, "one") for case in cases}
        columns = {}
        for world in options.ranks:
            ways = [how for how in options.ways if world > 2 or how in ("ddp", "fsdp")]
            with tempfile.TemporaryDirectory() as folder:
                ranks = start(train_all, world, Path(folder), cases, ways, timeout=3600)
            for how in ways:
                columns[f"{how} {world}"] = [found[how] for found in ranks]
        print("\n" + f"{name:36}" + "".join(f"{column:>18}" for column in columns))
        for case in cases:
            for regularizer in REGULARIZERS:
                cells = []
                for ranks in columns.values():
                    theirs = expected[case.optimizer][regularizer]
                    ours = [found[case.optimizer][regularizer] for found in ranks]
                    weights, all_of_it = (max(difference(o, theirs, state=s) for o in ours) for s in (False, True))
                    cells.append("support" if weights == math.inf else f"{weights:.0e} ({all_of_it:.0e})")
                print(f"{case.optimizer:8} {regularizer:27}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def train_all(cases: list[Case], ways: list[str]) -> dict:
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    return {how: {case.optimizer: run(case, how) for case in cases} for how in ways}


if __name__ == "__main__":
    main()
