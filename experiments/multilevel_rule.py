"""How long cycles should be and whether fine steps should be boosted: validation accuracy of the MNIST MLP at 5 %.

15 epochs, otherwise the defaults of `torch-bregman train`. Test data are not looked at by this script.

    python experiments/multilevel_rule.py --data-root DIR [--seeds 0 1 2]

Writes experiments/results/multilevel-rule.json and prints mean ± std (of the sample) per rule.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from reproduce.machine import describe_machine
from torch_bregman.train import Recipe, fit

HERE = Path(__file__).parent
RULES: list[tuple[str, dict[str, Any]]] = [
    ("the optimizer alone", {"multilevel": False}),
    ("published: 99 coarse, 1 fine", {"coarse_steps": 99, "fine_steps": 1, "boost": 1.0}),
    ("the same, boost 100 (drift)", {"coarse_steps": 99, "fine_steps": 1, "boost": 100.0}),
    ("56 coarse, 8 fine", {"coarse_steps": 56, "fine_steps": 8}),
    ("56 coarse, 8 fine, boost 2.8 (noise)", {"coarse_steps": 56, "fine_steps": 8, "boost": 8**0.5}),
    ("19 coarse, 1 fine", {"coarse_steps": 19, "fine_steps": 1}),
    ("9 coarse, 1 fine", {"coarse_steps": 9, "fine_steps": 1}),
    ("9 coarse, 1 fine, boost 3.2 (noise)", {"coarse_steps": 9, "fine_steps": 1, "boost": 10**0.5}),
    ("9 coarse, 1 fine, boost 10 (drift)", {"coarse_steps": 9, "fine_steps": 1, "boost": 10.0}),
    ("4 coarse growing to 19, 1 fine", {"margin": 0.0, "boost": 1.0}),
    ("4 coarse growing to 19, margin 0.5", {"margin": 0.5, "boost": 1.0}),
    ("4 coarse growing to 19, margin 1", {"margin": 1.0, "boost": 1.0}),
    ("default: the same, making up where gradients agree", {}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="a folder that holds mnist/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    path = HERE / "results" / "multilevel-rule.json"
    rows = [row(label, choice, options.seeds, options.data_root) for label, choice in RULES]
    content = {
        "recipe": {"dataset": "mnist", "epochs": 15, "density": 0.05, "all else": "defaults of torch-bregman train"},
        "command": "python experiments/multilevel_rule.py --data-root DIR",
        "environment": describe_machine(),
        "seeds": options.seeds,
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def row(label: str, choice: dict[str, Any], seeds: list[int], root: Path | None) -> dict[str, Any]:
    accuracies, dense = [], []
    for seed in seeds:
        recipe = Recipe(
            **{"dataset": "mnist", "epochs": 15, "density": 0.05, "multilevel": True, "seed": seed, **choice}
        )
        with tempfile.TemporaryDirectory() as folder:
            end = fit(recipe.check(), Path(folder), data_root=root, quiet=True)
            epochs = [json.loads(text) for text in (Path(folder) / "metrics.jsonl").read_text().splitlines()[:-1]]
        accuracies.append(epochs[-1]["val_accuracy"])  # of the last epoch, not the best
        steps = end.get("fine_steps", 1) + end.get("coarse_steps", 0)
        dense.append(end.get("fine_steps", 1) / steps)
    mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies) if len(seeds) > 1 else 0.0
    print(f"{label:52}{100 * mean:8.2f} ± {100 * spread:.2f}   {max(dense):6.1%} of the steps fine", flush=True)
    return {"rule": label, **choice, "val_accuracy": accuracies, "val_accuracy_mean": mean, "val_accuracy_std": spread,
            "fine_share": dense}  # fmt: skip


if __name__ == "__main__":
    main()
