"""Print the tables of README.md and docs/ from experiments/results/*.json: python experiments/table.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def main() -> None:
    print("| data set | method | asked | got | test accuracy | seconds |\n|---|---|---|---|---|---|")
    for name in ("digits", "mnist", "fashion-mnist"):
        for row in load(name)["rows"]:
            asked = f"{100 * row['asked']:g} %" if row["asked"] else "—"
            got = ", ".join(dict.fromkeys(f"{100 * kept:.2f}" for kept in row["kept"]))
            accuracy = f"{100 * row['test_accuracy_mean']:.2f} ± {100 * row['test_accuracy_std']:.2f} %"
            print(f"| {name} | {row['method']} | {asked} | {got} % | {accuracy} | {max(row['seconds']):.0f} |")
    print("\n| asked | AdaBreg got | LinBreg got |\n|---|---|---|")
    rows = load("asked-and-got")["rows"]
    for ada, lin in zip(rows[:5], rows[5:], strict=True):
        print(f"| {100 * ada['asked']:g} % | {100 * ada['kept'][0]:.3f} % | {100 * lin['kept'][0]:.3f} % |")
    print("\n| asked | what happens when λ moves | kept | validation accuracy |\n|---|---|---|---|")
    for row in load("lambda_moves")["rows"]:
        kept = ", ".join(dict.fromkeys(f"{100 * kept:.2f}" for kept in row["kept"]))
        accuracy = f"{100 * row['val_accuracy_mean']:.2f} ± {100 * row['val_accuracy_std']:.2f} %"
        print(f"| {100 * row['asked']:g} % | {row['move']} | {kept} % | {accuracy} |")
    print("\n| rule | validation accuracy | fine steps |\n|---|---|---|")
    for row in load("multilevel-rule")["rows"]:
        accuracy = f"{100 * row['val_accuracy_mean']:.2f} ± {100 * row['val_accuracy_std']:.2f} %"
        print(f"| {row['rule']} | {accuracy} | {100 * max(row['fine_share']):.1f} % |")
    print("\n| task | method | validation | test | kept | fine steps | FLOPs | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for name in ("mnist-mlp", "fashion-convnet"):
        for row in load(f"multilevel-{name}")["rows"]:
            kept = ", ".join(dict.fromkeys(f"{100 * kept:.2f}" for kept in row["kept"]))
            cells = [name, row["method"]]
            for kind in ("val", "test"):
                mean, spread = row[f"{kind}_accuracy_mean"], row[f"{kind}_accuracy_std"]
                cells.append(f"{100 * mean:.2f} ± {100 * spread:.2f} %")
            fine, work = "all", "100 %"
            if "flops" in row:
                fine, coarse = row["fine_steps"], row["coarse_steps"]
                fine = f"{100 * max(f / (f + c) for f, c in zip(fine, coarse, strict=True)):.1f} %"
                work = f"{100 * max(f / d for f, d in zip(row['flops'], row['dense_flops'], strict=True)):.0f} %"
            cells += [f"{kept} %", fine, work, f"{max(row['seconds']):.0f}"]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
