"""Multilevel training beside the optimizer alone: accuracy at equal epochs and density. Three seeds each.

All settings are the defaults of `torch-bregman train`, but for the model and the epochs of the ConvNet. The rule
behind `--multilevel` was chosen on validation data (docs/multilevel.md); a run reads the test data once, at its end.

    python experiments/multilevel.py --data-root DIR [--only NAME] [--seeds 0 1 2] [--rows REGEX]

Writes experiments/results/multilevel-NAME.json and prints mean ± std (of the sample) per row. With --rows the others
stay as they are in that file.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

from torch_bregman.reproduce import describe_machine
from torch_bregman.train import Recipe, fit

HERE = Path(__file__).parent
TASKS: dict[str, dict[str, Any]] = {
    "mnist-mlp": {"dataset": "mnist", "density": 0.05},
    "fashion-convnet": {"dataset": "fashion-mnist", "model": "convnet", "density": 0.03, "epochs": 10},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="a folder that holds mnist/ and fashion-mnist/")
    parser.add_argument("--only", choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", default="", help="a regular expression for the names of the rows to run")
    options = parser.parse_args()
    for name in [options.only] if options.only else TASKS:
        path, rows = HERE / "results" / f"multilevel-{name}.json", []
        before = {row["method"]: row for row in json.loads(path.read_text())["rows"]} if options.rows else {}
        for label, multilevel in (("AdaBreg", False), ("AdaBreg, multilevel", True)):
            recipe = {**TASKS[name], "multilevel": multilevel}
            if label in before and not re.search(options.rows, label):
                rows.append(before[label])
            else:
                rows.append(row(name, label, recipe, options.seeds, options.data_root))
        content = {
            "recipe": {**TASKS[name], "all else": "defaults of torch-bregman train"},
            "command": f"python experiments/multilevel.py --data-root DIR --only {name} --seeds "
            + " ".join(map(str, options.seeds)),
            "environment": describe_machine(),
            "seeds": options.seeds,
            "rows": rows,
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"→ {path.relative_to(HERE.parent)}")


def row(name: str, label: str, choice: dict[str, Any], seeds: list[int], root: Path | None) -> dict[str, Any]:
    ends = []
    for seed in seeds:
        recipe = Recipe(seed=seed, **choice).check()
        with tempfile.TemporaryDirectory() as run:
            ends.append(fit(recipe, Path(run), data_root=root, quiet=True))
    result: dict[str, Any] = {"method": label, "asked": choice["density"], "kept": [end["density"] for end in ends]}
    for kind in ("val", "test"):
        accuracies = [end[f"{kind}_accuracy"] for end in ends]
        result |= {
            f"{kind}_accuracy": accuracies,
            f"{kind}_accuracy_mean": statistics.mean(accuracies),
            f"{kind}_accuracy_std": statistics.stdev(accuracies) if len(ends) > 1 else 0.0,
        }
    result["seconds"] = [end["seconds"] for end in ends]
    for key in ("fine_steps", "coarse_steps", "flops", "dense_flops"):
        if key in ends[0]:
            result[key] = [end[key] for end in ends]
    steps = f"fine steps {result['fine_steps']}, coarse {result['coarse_steps']}" if "fine_steps" in result else ""
    print(
        f"{name:16} {label:20} val {100 * result['val_accuracy_mean']:.2f} ± {100 * result['val_accuracy_std']:.2f}   "
        f"test {100 * result['test_accuracy_mean']:.2f} ± {100 * result['test_accuracy_std']:.2f} %   "
        f"kept {[round(100 * kept, 3) for kept in result['kept']]}   {max(result['seconds']):.0f} s   {steps}",
        flush=True,
    )
    return result


if __name__ == "__main__":
    main()
