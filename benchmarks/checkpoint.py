"""What a checkpoint of several ranks costs: the copy to the memory of the host, the rest of the stall, the whole save.

    python benchmarks/checkpoint.py [--ranks 1 2] [--saves 10]

ResNet-18 with AdaBreg (weights, v and two moments: 179 MB) under --strategy ddp, gloo on the CPU. "stall" is what
training waits for beyond the copy ("busy": for how much of it this thread had the processor, which is what remains on a
machine that does nothing else), "whole" is until the folder has its name, while training steps go on. Medians over
the saves but the first, which also allocates. Prints a table and writes benchmarks/results/checkpoint.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import torch_bregman as tb
from torch_bregman.models import build
from torch_bregman.train import Recipe
from torch_bregman.train.folders import Folders
from torch_bregman.train.ranks import start

RESULT = Path(__file__).parent / "results" / "checkpoint.json"
COLUMNS = ("copy", "stall", "busy", "whole", "first copy", "first stall")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--saves", type=int, default=10)
    options = parser.parse_args()
    print("ranks" + "".join(f"{name:>14}" for name in COLUMNS) + "   (ms)")
    rows = []
    for ranks in options.ranks:
        row = {"ranks": ranks, **measure(ranks, options.saves)}
        rows.append(row)
        print(f"{ranks:5}" + "".join(f"{1e3 * row[name]:14.1f}" for name in COLUMNS), flush=True)
    about = {"torch": torch.__version__, "cores": os.cpu_count(), "machine": platform.machine()}
    RESULT.write_text(json.dumps({**about, "saves": options.saves, "seconds": rows}, indent=1) + "\n")


def measure(ranks: int, saves: int) -> dict[str, Any]:
    """Seconds of the first rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "worker", folder, str(saves)]
        names = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
        jobs = [
            subprocess.Popen(command, env={**os.environ, **names, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)
        ]
        assert [job.wait() for job in jobs] == [0] * ranks
        return json.loads((Path(folder) / "seconds.json").read_text())


def work(folder: Path, saves: int) -> None:
    """One rank."""
    with start("ddp", Recipe(device="cpu").check()) as ranks:
        torch.manual_seed(0)
        model = tb.sparse_init_(build("resnet18", (3, 32, 32), 10), 0.05)
        x, y = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
        network = ranks.wrap(model, x)
        optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1(), lam=0.1), lr=1e-3)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()

        step()
        checkpoints, copies, stalls, wholes, busy = Folders(folder, print, ranks), [], [], [], []
        stage = checkpoints._stage

        def timed_stage(tensors: dict[str, torch.Tensor]) -> None:
            begun, worked = time.perf_counter(), time.thread_time()
            stage(tensors)
            copies.append(time.perf_counter() - begun)
            busy.append(worked - time.thread_time())

        checkpoints._stage = timed_stage
        for number in range(saves):
            ranks.gather(None)  # no rank waits for another in what is timed
            begun, worked = time.perf_counter(), time.thread_time()
            state = {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state(),
                "cuda": None,
            }  # fmt: skip
            checkpoints.save(number, state, urgent=True)
            stalls.append(time.perf_counter() - begun - copies[-1])
            busy[-1] += time.thread_time() - worked
            writing = checkpoints._thread
            assert writing is not None
            while any(ranks.any(writing.is_alive())):
                step()
            wholes.append(time.perf_counter() - begun)
            checkpoints.wait()
        if ranks.first:
            found = {"first copy": copies[0], "first stall": stalls[0]}
            for name, values in (("copy", copies), ("stall", stalls), ("busy", busy), ("whole", wholes)):
                found[name] = statistics.median(values[1:])
            found["bytes"] = sum(t.numel() * t.element_size() for t in checkpoints._staged.values())
            (folder / "seconds.json").write_text(json.dumps(found))


if __name__ == "__main__":
    work(Path(sys.argv[2]), int(sys.argv[3])) if sys.argv[1:2] == ["worker"] else main()
