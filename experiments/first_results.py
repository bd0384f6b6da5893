"""The figures of the README: the default settings of `torch-bregman train`, three seeds each.

A run reads the test data once, at its end; settings are not chosen here.

    python experiments/first_results.py --data-root DIR [--only NAME] [--seeds 0 1 2]

Writes experiments/results/NAME.json and prints mean ± std (of the sample) per row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from torch_bregman.reproduce import describe_machine
from torch_bregman.train import Recipe, fit

HERE = Path(__file__).parent
ROWS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "digits": [("AdaBreg 5 %", {"density": 0.05}), ("dense Adam", {"optimizer": "adam"})],
    "mnist": [
        ("AdaBreg 5 %", {"density": 0.05}),
        ("AdaBreg 2 %", {"density": 0.02}),
        ("dense Adam", {"optimizer": "adam"}),
    ],
    "fashion-mnist": [("AdaBreg 5 %", {"density": 0.05}), ("dense Adam", {"optimizer": "adam"})],
}
ASKED = [
    (f"{optimizer} {density:.0%}", {"optimizer": optimizer, "density": density})
    for optimizer in ("adabreg", "linbreg")
    for density in (0.2, 0.1, 0.05, 0.02, 0.01)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="a folder that holds mnist/ and fashion-mnist/")
    parser.add_argument("--only", choices=[*ROWS, "asked-and-got"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    for name in [options.only] if options.only else [*ROWS, "asked-and-got"]:
        seeds = options.seeds if name in ROWS else options.seeds[:1]
        dataset, rows = (name, ROWS[name]) if name in ROWS else ("mnist", ASKED)
        results = [row(label, dataset, choice, seeds, options.data_root) for label, choice in rows]
        content = {
            "recipe": {"dataset": dataset, "all else": "defaults of torch-bregman train"},
            "command": f"python experiments/first_results.py --data-root DIR --only {name}",
            "environment": describe_machine(),
            "seeds": seeds,
            "rows": results,
        }
        path = HERE / "results" / f"{name}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"→ {path.relative_to(HERE.parent)}")


def row(label: str, dataset: str, choice: dict[str, Any], seeds: list[int], root: Path | None) -> dict[str, Any]:
    ends = []
    for seed in seeds:
        recipe = Recipe(dataset=dataset, seed=seed, **choice).check()
        with tempfile.TemporaryDirectory() as run:
            ends.append(fit(recipe, Path(run), data_root=root, quiet=True))
    accuracies = [end["test_accuracy"] for end in ends]
    spread = statistics.stdev(accuracies) if len(ends) > 1 else 0.0
    result = {
        "method": label,
        "asked": ends[0]["asked_density"],
        "kept": [end["density"] for end in ends],
        "test_accuracy": accuracies,
        "test_accuracy_mean": statistics.mean(accuracies),
        "test_accuracy_std": spread,
        "val_accuracy": [end["val_accuracy"] for end in ends],
        "seconds": [end["seconds"] for end in ends],
    }
    kept = ", ".join(f"{end['density']:.3%}" for end in ends)
    print(
        f"{dataset:14} {label:14} test {100 * result['test_accuracy_mean']:.2f} ± {100 * spread:.2f} %   "
        f"kept {kept}   {max(result['seconds']):.0f} s",
        flush=True,
    )
    return result


if __name__ == "__main__":
    main()
