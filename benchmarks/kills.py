"""A run whose ranks are killed at random moments ends with the weights of one that was left alone, bit for bit.

    python benchmarks/kills.py [--kills 50] [--ranks 2] [--epochs 60] [--strategy ddp] [--seed 0]

Trains the network of `torch-bregman train digits` twice under torchrun: in peace, and with SIGKILL for a random rank
again and again, also while it starts or writes a checkpoint. A run that ends before has had fewer kills than asked for.
Adds to benchmarks/results/kills.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

RESULT = Path(__file__).parent / "results" / "kills.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        peace, war = Path(folder) / "peace", Path(folder) / "war"
        begun = time.perf_counter()
        start(peace, options).wait()
        alone = time.perf_counter() - begun
        print(f"in peace: {alone:.0f} s", flush=True)
        begun = time.perf_counter()
        kills, steps = disturb(start(war, options), war, options)
        seconds = time.perf_counter() - begun
        a, b = (load_file(run / "last.safetensors") for run in (peace, war))
        same = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    result = {
        **vars(options), "kills": kills, "resumed_at_steps": steps, "identical": same,
        "seconds_in_peace": round(alone), "seconds_with_kills": round(seconds), "torch": torch.__version__,
    }  # fmt: skip
    others = [run for run in json.loads(RESULT.read_text()) if run["seed"] != options.seed] if RESULT.exists() else []
    RESULT.write_text(json.dumps([*others, result], indent=1) + "\n")
    print(f"{kills} kills, {seconds:.0f} s: the final weights are {'identical' if same else 'DIFFERENT'}")
    sys.exit(not same)


def start(run: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """The run under torchrun; what it says goes into a file beside its folder."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks),
        "--max-restarts", str(2 * options.kills + 10), "--monitor-interval", "0.1",
        __file__, "worker", "train", "digits", "--strategy", options.strategy, "--epochs", str(options.epochs),
        "--batch-size", "50", "--density", "0.1", "--quiet", "--out", str(run),
    ]  # fmt: skip
    log = open(run.with_suffix(".log"), "wb")  # noqa: SIM115 - the process has it
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def disturb(job: subprocess.Popen[bytes], run: Path, options: argparse.Namespace) -> tuple[int, list[int]]:
    """Kill ranks until there were enough kills or the run has ended: their number, and the step that was saved then."""
    rng, kills, steps, begun = random.Random(options.seed), 0, list[int](), time.perf_counter()
    while job.poll() is None and kills < options.kills:
        ranks, last = children(job.pid), saved(run)
        early = rng.random() < 0.1  # at any moment, else after a save of these ranks
        while job.poll() is None and not early and saved(run) == last:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 2.0))
        if len(ranks) < options.ranks or ranks != children(job.pid):
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(sorted(ranks)), signal.SIGKILL)
            kills += 1
            steps.append(saved(run))
            print(f"{kills} kills, step {steps[-1]} saved, {time.perf_counter() - begun:.0f} s", flush=True)
        while ranks & children(job.pid) and job.poll() is None:
            time.sleep(0.01)
    job.wait()
    return kills, steps


def saved(run: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    return max((int(path.name.removeprefix("step-")) for path in run.glob("checkpoint/step-????????")), default=0)


def children(pid: int) -> set[int]:
    """The processes that this one has started."""
    try:
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except OSError:
        return set()


def work() -> None:
    """What torchrun starts: the command line, saving as often as it can."""
    from torch_bregman.cli import main as command_line
    from torch_bregman.train import loop

    loop.LOOK_EVERY, loop.SAVE_EVERY, loop.SAVE_SHARE = 0.1, 0.5, 1e9
    command_line(sys.argv[2:])


if __name__ == "__main__":
    work() if sys.argv[1:2] == ["worker"] else main()
