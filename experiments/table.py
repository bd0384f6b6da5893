"""Print the tables of README.md and docs/density.md from experiments/results/*.json: python experiments/table.py"""

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


if __name__ == "__main__":
    main()
