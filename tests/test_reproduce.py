"""The published tables beside ours: recipe files, runs that are interrupted, result files and their page."""

import dataclasses
import json
import re
import shutil
import signal
import statistics
import threading
import time
from pathlib import Path

import pytest
import torch

import tune
from reproduce import machine, running
from reproduce.cells import COLUMNS, describe, spread, table
from reproduce.curves import draw_curves, family
from reproduce.page import comparison, overview, results_page, write_page
from reproduce.recipes import Row, find_recipes, read_experiment, read_experiments
from reproduce.results import named_now, read_results, summarise
from reproduce.variance import variances
from torch_bregman.cli import main
from torch_bregman.models import build
from torch_bregman.train.errors import RunError, Stopped
from torch_bregman.train.recipe import Recipe

CLONE = Path(__file__).parents[1]
HEAD = 'title = "Tiny"\ntask = "MLP on digits"\nsource = "Nobody, 2022"\n'
TINY = (
    HEAD
    + """
[shared]
dataset = "digits"
epochs = 2
limit = 200

[quick]
epochs = 1
limit = 60

[[rows]]
method = "dense | Adam"
optimizer = "adam"
published = { accuracy = 0.98, density = 1.0 }

[[rows]]
method = "sparse"
density = 0.1
published = { accuracy = 0.97, density = 0.11, note = "validation" }

[[rows]]
method = "from the future"
optimizer = "sgdd"
density = 0.1
published = { accuracy = 0.5, density = 0.9 }
"""
)


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder laid out as a clone, with one recipe."""
    (tmp_path / "experiments" / "recipes").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "experiments" / "recipes" / "tiny.toml").write_text(TINY)
    return tmp_path


def recipe_of(clone: Path) -> Path:
    return clone / "experiments" / "recipes" / "tiny.toml"


def works(*arguments) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", *map(str, arguments)])
    assert ended.value.code == 0


def fails(capsys, *arguments) -> str:
    """The one sentence of a command that fails with exit code 1."""
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", *map(str, arguments)])
    assert ended.value.code == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("Error: ")
    assert said.count("\n") == 0
    return said


def part(accuracy: float, density: float = 0.1, **end) -> dict:
    """What a run leaves behind."""
    row = {"asked_density": 0.1, "density": density, "weights": 1000, "test_accuracy": accuracy, "test_loss": 1.0}
    return {
        "end": {**row, "val_accuracy": accuracy, "val_loss": 0.5, "seconds": 3.0, **end}, "memory": 2**20 * 300,
        "threads": 1, "dense_flops": 8e9, "curve": {"val_accuracy": [0.1, accuracy], "density": [0.01, density]},
    }  # fmt: skip


@pytest.fixture
def fake(monkeypatch):
    """Runs that end at once, counted; `fake.stop_at` is the one that Ctrl-C comes in."""

    class Fake:
        def __init__(self) -> None:
            self.ran: list[str] = []
            self.stop_at = 10**6

        def __call__(self, runs, data_root, started=None):
            for run in runs:
                if len(self.ran) == self.stop_at:
                    raise KeyboardInterrupt
                self.ran.append(run.name.rpartition("-")[0])
                seed = Recipe.read(run / "recipe.toml").seed
                (run / "result.json").write_text(json.dumps(part(0.9 + seed / 100)))

    fake = Fake()
    monkeypatch.setattr(running, "run_in_process", fake)
    return fake


# ---------------------------------------------------------------------- a whole reproduction


def test_a_table_from_the_command_line(clone, inside):
    done = inside("reproduce", "tiny", "--seeds", 3, "--recipes", recipe_of(clone).parent, "--plots")
    assert done.returncode == 0, done.stderr
    assert "skipped: from the future" in done.stdout
    assert "published 97.00 % at 11.00 % (validation)" in done.stdout
    assert "of 29,600 weights" in done.stdout
    content = json.loads((clone / "experiments" / "results" / "tiny.json").read_text())
    assert content["seeds"] == [3]
    assert content["command"] == "torch-bregman reproduce tiny --seeds 3"
    assert content["environment"]["torch"] == torch.__version__
    assert content["environment"]["threads"] == [1]
    assert content["skipped"] == ["from the future"]
    dense, sparse = content["rows"]
    assert (dense["method"], dense["asked"], dense["kept"]) == ("dense | Adam", None, [1.0])
    assert sparse["asked"] == 0.1
    assert sparse["published"] == {"value": 0.97, "density": 0.11, "source": "Nobody, 2022", "note": "validation"}
    for row in (dense, sparse):
        # three products of two operations per weight, sample and epoch
        assert row["dense_flops"] == row["flops"] == [6.0 * row["weights"] * 200 * 2]
        assert 50e6 < row["peak_memory"][0] < 5e9
        assert row["seconds"][0] > 0
        assert len(row["curve"]["val_accuracy"]) == 3
        assert 0 < row["test_accuracy_mean"] == row["test_accuracy"][0] <= 1
    assert not (clone / "experiments" / "results" / ".reproduce" / "tiny").exists()
    page = (clone / "docs" / "results.md").read_text()
    assert r"| dense \| Adam | — | 100.00 % |" in page
    assert "from the future" in page
    assert "not yet run" in page
    assert "![Tiny](results-tiny.png)" in page
    assert 1000 < (clone / "docs" / "results-tiny.png").stat().st_size < 200_000


def test_a_run_that_was_stopped_goes_on(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    Recipe(dataset="digits", epochs=100, seed=1).check().write(run / "recipe.toml")
    metrics = run / "metrics.jsonl"

    def press_ctrl_c() -> None:
        while not metrics.exists() or metrics.read_text().count("\n") < 5:
            time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    # A shell has its background jobs ignore Ctrl-C, and the tests may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=press_ctrl_c, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            running.run_in_process([run], None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (run / "checkpoint.pt").exists()
    assert not (run / "result.json").exists()
    before = metrics.read_text().splitlines()
    assert 5 <= len(before) < 100
    running.run_in_process([run], None)
    result = json.loads((run / "result.json").read_text())
    assert len(result["curve"]["val_accuracy"]) == 101
    assert "Resumed" in (run / "log.txt").read_text()
    assert result["curve"]["val_accuracy"][: len(before)] == [json.loads(row)["val_accuracy"] for row in before]
    assert {path.name for path in run.iterdir()} == {"recipe.toml", "log.txt", "result.json"}


def test_an_interrupted_reproduction_runs_only_what_is_missing(clone, fake):
    experiment, out = read_experiment(recipe_of(clone)), clone / "out"
    said: list[str] = []
    fake.stop_at = 3
    with pytest.raises(Stopped, match="the same command goes on"):
        running.reproduce(experiment, out, seeds=(0, 1), say=said.append)
    assert fake.ran == ["dense-adam-0", "dense-adam-1", "sparse-0"]
    assert not (out / "tiny.json").exists()
    assert (out / ".reproduce" / ".gitignore").read_text() == "*\n"

    fake.ran, fake.stop_at = [], 10**6
    content = running.reproduce(experiment, out, seeds=(0, 1), say=said.append)
    assert fake.ran == ["sparse-1"]
    assert any("3 runs that had ended" in line for line in said)
    assert content["rows"][1]["test_accuracy"] == [0.9, 0.91]
    assert json.loads((out / "tiny.json").read_text()) == content
    assert not (out / ".reproduce" / "tiny").exists()


def test_some_rows_are_run_again_and_the_others_stay(clone, fake):
    out = clone / "out"
    running.reproduce(read_experiment(recipe_of(clone)), out, seeds=(0, 1), command="all", say=lambda text: None)
    before = json.loads((out / "tiny.json").read_text())
    fake.ran = []
    experiment = read_experiment(recipe_of(clone))
    content = running.reproduce(experiment, out, seeds=(2,), only="^sparse$", command="one", say=lambda text: None)
    assert fake.ran == ["sparse-2"]
    dense, sparse = content["rows"]
    assert dense == {"seeds": [0, 1], "command": "all"} | before["rows"][0]
    assert sparse["test_accuracy"] == [0.92]
    assert "seeds" not in sparse
    assert (content["seeds"], content["command"]) == ([2], "one")
    assert json.loads((out / "tiny.json").read_text()) == content

    page = results_page({"tiny": experiment}, {"tiny": content})
    assert "* dense | Adam: `all`; seeds 0 1" in page

    # What was made with options that the recipe no longer has is not shown beside them.
    recipe_of(clone).write_text(TINY.replace('optimizer = "adam"', 'optimizer = "adam"\nlr = 0.01'))
    experiment = read_experiment(recipe_of(clone))
    assert [row["method"] for row in running.reproduce(experiment, out, only="sparse", say=print)["rows"]] == ["sparse"]


def test_rows_of_a_model_that_has_moved_stay(clone, fake):
    """Result files name it as it was called when they were made."""
    head = TINY.replace("[shared]", '[shared]\nmodel = "MODEL"')
    recipe_of(clone).write_text(head.replace("MODEL", "torch_bregman.reproduce:narrow_resnet"))
    out = clone / "out"
    running.reproduce(read_experiment(recipe_of(clone)), out, say=lambda text: None)
    recipe_of(clone).write_text(head.replace("MODEL", "torch_bregman.models.resnet:narrow_resnet"))
    content = running.reproduce(read_experiment(recipe_of(clone)), out, only="^sparse$", say=lambda text: None)
    assert [row["method"] for row in content["rows"]] == ["dense | Adam", "sparse"]
    for old in (CLONE / "experiments" / "results" / "cifar-narrow-resnet.json",):
        options = {row["method"]: named_now(row["options"]) for row in json.loads(old.read_text())["rows"]}
        recipe = read_experiment(find_recipes(None) / f"{old.stem}.toml")
        assert options == {row.method: row.options for row in recipe.rows}
    small, same = (
        build(f"torch_bregman.{where}:narrow_resnet", (3, 8, 8), 4) for where in ("reproduce", "models.resnet")
    )
    assert small.head.in_features == same.head.in_features == 64


@pytest.mark.parametrize(("only", "expected"), [("spars$", "no row in which 'spars$'"), ("(", "regular expression")])
def test_rows_that_are_not_there(clone, only, expected):
    with pytest.raises(RunError, match=re.escape(expected)):
        running.reproduce(read_experiment(recipe_of(clone)), clone / "out", only=only, say=print)


@pytest.mark.parametrize("change", ["option", "version", "data"])
def test_runs_under_other_conditions_are_not_taken_over(clone, fake, change, monkeypatch):
    experiment, out = read_experiment(recipe_of(clone)), clone / "out"
    fake.stop_at = 1
    with pytest.raises(Stopped):
        running.reproduce(experiment, out, seeds=(0,), say=lambda text: None)
    fake.ran, fake.stop_at = [], 10**6
    root = None
    if change == "option":
        recipe_of(clone).write_text(TINY.replace("epochs = 2", "epochs = 3"))
        experiment = read_experiment(recipe_of(clone))
    elif change == "version":
        monkeypatch.setattr(machine, "__version__", "9.9")
    else:
        root = clone
    running.reproduce(experiment, out, seeds=(0,), data_root=root, say=lambda text: None)
    assert fake.ran == ["dense-adam-0", "sparse-0"]


def test_a_run_that_fails_is_named(clone, tmp_path):
    experiment = read_experiment(recipe_of(clone))
    bad = dataclasses.replace(experiment, rows=(Row("broken", {"dataset": str(tmp_path / "no.npz")}),))
    with pytest.raises(RunError, match=r"row 'broken'.*no\.npz"):
        running.reproduce(bad, clone / "out", seeds=(0,), say=lambda text: None)


def test_mean_and_std_are_those_of_the_sample():
    values = [0.9, 0.92, 0.97]
    row = summarise(Row("m", {}), "s", [part(value, 0.1 + value / 1e3) for value in values])
    assert row["test_accuracy_mean"] == pytest.approx(sum(values) / 3)
    assert row["test_accuracy_std"] == pytest.approx(statistics.stdev(values))
    assert row["published"] is None
    assert spread(row, "test_accuracy") == "93.00 ± 3.61 %"
    assert describe({**row, "flops": [2e9] * 3}).count("2.00e+09 (25%)") == 1
    assert "±" not in describe(summarise(Row("m", {}), "s", [part(0.9)]))


def test_linear_weights_and_kernels_are_shown_apart():
    row = {"options": {"groups": "kernels"}, "kept_linear": [0.03, 0.04], "kept_kernels": [0.02, 0.02]}
    assert COLUMNS["Linear / kernels kept"](row) == "3.50 % / 2.00 %"
    assert COLUMNS["Linear / kernels kept"](row | {"options": {}}) == ""
    assert COLUMNS["Linear / kernels kept"](row | {"kept_kernels": [None, None]}) == ""


def test_a_run_that_was_never_on_target_has_no_validation_score():
    off = part(0.8)
    del off["end"]["val_accuracy"], off["end"]["val_loss"]
    row = summarise(Row("m", {}), "s", [part(0.9), off])
    assert row["test_accuracy"] == [0.9, 0.8]
    assert "val_accuracy" not in row


# ---------------------------------------------------------------------- --quick


def test_quick_runs_every_row_and_says_that_it_means_nothing(clone, capsys):
    works("tiny", "--quick", "--recipes", str(recipe_of(clone).parent), "--out", str(clone / "quick"))
    said = capsys.readouterr().out
    assert said.count("mean nothing") == 2
    content = json.loads((clone / "quick" / "tiny.json").read_text())
    assert content["quick"] is True
    assert content["seeds"] == [0]
    assert [row["dense_flops"] for row in content["rows"]] == [[6.0 * row["weights"] * 60] for row in content["rows"]]
    assert "mean nothing" in (clone / "quick" / "results.md").read_text()
    assert not (clone / "experiments" / "results").exists()
    assert list((clone / "docs").iterdir()) == []


def test_quick_never_overwrites_results(clone, fake, capsys, monkeypatch):
    experiment, out = read_experiment(recipe_of(clone)), clone / "experiments" / "results"
    with monkeypatch.context() as here:  # not even a free name in the folder of the clone
        here.setattr("reproduce.recipes.EXPERIMENTS", clone / "experiments")
        assert "the folder of the real results" in fails(capsys, "tiny", "--quick", "--out", out)
    assert not out.exists()
    real = running.reproduce(experiment, out, seeds=(0,), say=lambda text: None)
    arguments = ["tiny", "--recipes", recipe_of(clone).parent]
    assert "tiny.json there is a real result" in fails(capsys, *arguments, "--quick", "--out", out)
    assert json.loads((out / "tiny.json").read_text()) == real
    fake.ran = []
    works(*arguments, "--quick")  # without --out nothing is written
    assert fake.ran == ["dense-adam-0", "sparse-0"]
    assert json.loads((out / "tiny.json").read_text()) == real
    assert not (clone / "docs" / "results.md").exists()


# ---------------------------------------------------------------------- recipe files and names


def test_the_recipes_of_the_clone_are_good():
    found = read_experiments(find_recipes(None))
    assert {
        "mnist-mlp", "fashion-convnet-l1", "fashion-convnet-groups", "sparse-init", "cifar-resnet18",
        "cifar-resnet18-table3", "cifar-narrow-resnet", "mnist-autoencoder", "architecture-search",
    } <= set(found)  # fmt: skip
    for experiment in found.values():
        assert [row.method for row in experiment.rows if row.unknown] == []
    for name in ("cifar-resnet18", "cifar-resnet18-table3"):
        assert all((row.options["device"], row.options["precision"]) == ("cuda", "bf16") for row in found[name].rows)
    options = {row.method: row.options for row in found["mnist-mlp"].rows}
    assert options["LinBreg, λ 1e-2"]["lr"] == 0.1  # as published
    momentum = options["LinBreg with momentum, λ 1e-1"]
    assert momentum["lr"] == pytest.approx(0.1 * (1 - momentum["momentum"]))


def test_an_unknown_name_suggests_the_nearest(clone, capsys):
    assert "did you mean 'tiny'?" in fails(capsys, "tinny", "--recipes", recipe_of(clone).parent)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("title =", "title ==", "Cannot read the recipe"),
        ("title =", "titel =", "did you mean 'title'?"),
        ('source = "Nobody, 2022"', "", "Invalid `source`"),
        ("density = 0.1\npublished = { accuracy = 0.97", "densty = 0.1\npublished = { accuracy = 0.97", "'density'?"),
        ("density = 0.1\npublished = { accuracy = 0.97", "density = 5\npublished = { accuracy = 0.97", "for 5 % write"),
        ("limit = 200", "seed = 1", "'seed'"),
        ("limit = 200", 'limit = "all"', "Invalid `limit`"),
        ("limit = 200", "model = 3", "Invalid `model`: 3"),
        ("limit = 60", "limti = 60", "did you mean 'limit'?"),
        ("accuracy = 0.97", "accuracy = 97", "Invalid `published.accuracy`: 97"),
        ("accuracy = 0.97", "acuracy = 0.97", "did you mean 'accuracy'?"),
        ('method = "sparse"', 'method = "dense | Adam"', "that no other row has"),
        ('method = "sparse"', "", "Invalid `method`"),
        ('source = "N', 'kind = "table"\nsource = "N', "Invalid `kind`"),
        ('source = "N', 'picture = "bars"\nsource = "N', "Invalid `picture`"),
        ("accuracy = 0.97", "ssim = 1.97", "Invalid `published.ssim`: 1.97"),
    ],
)
def test_a_bad_recipe_is_one_sentence_with_its_file(clone, capsys, old, new, expected):
    assert old in TINY
    recipe_of(clone).write_text(TINY.replace(old, new, 1))
    said = fails(capsys, "tiny", "--recipes", recipe_of(clone).parent)
    assert expected in said
    assert "tiny.toml" in said


def test_a_recipe_without_rows_and_a_folder_without_recipes(clone, capsys, tmp_path):
    recipe_of(clone).write_text(HEAD)
    assert "no [[rows]]" in fails(capsys, "tiny", "--recipes", recipe_of(clone).parent)
    recipe_of(clone).unlink()
    assert "no recipe files" in fails(capsys, "--recipes", recipe_of(clone).parent)
    assert "There is no folder" in fails(capsys, "--recipes", tmp_path / "nowhere")


def test_from_a_wheel_the_command_says_that_it_needs_a_clone(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch_bregman.cli.reproduce.EXPERIMENTS", tmp_path / "env" / "lib" / "experiments")
    assert "clone the repository, and install it there with pip install -e" in fails(capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tiny", "--all"], "exclude each other"),
        (["tiny", "--seeds", "1", "1"], "Invalid `seeds`"),
        (["tiny", "--seeds", "-1"], "Invalid `seeds`"),
    ],
)
def test_arguments_that_make_no_sense(clone, capsys, arguments, expected):
    assert expected in fails(capsys, *arguments, "--recipes", recipe_of(clone).parent)


def test_without_a_gpu_its_tables_are_passed_over(clone, fake, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    other = TINY.replace("epochs = 2", 'device = "cuda"\nepochs = 2').replace(
        "epochs = 1", 'device = "cpu"\nepochs = 1'
    )
    (recipe_of(clone).parent / "big.toml").write_text(other)
    folder = str(recipe_of(clone).parent)
    assert "it needs a device 'cuda'" in fails(capsys, "big", "--recipes", folder)
    works("--all", "--seeds", "0", "--recipes", folder)
    assert "big is passed over" in capsys.readouterr().out
    assert fake.ran == ["dense-adam-0", "sparse-0"]
    page = (clone / "docs" / "results.md").read_text()
    assert "Not yet run: it needs a device cuda." in page.partition("## tiny")[0]
    fake.ran = []
    works("big", "--quick", "--recipes", folder)
    assert fake.ran == ["dense-adam-0", "sparse-0"]


# ---------------------------------------------------------------------- the list and the page


def test_the_list_shows_published_and_ours(clone, fake, capsys):
    folder = str(recipe_of(clone).parent)
    works("--recipes", folder)
    before = " ".join(capsys.readouterr().out.split())
    assert "not yet run" in before
    running.reproduce(read_experiment(recipe_of(clone)), clone / "experiments" / "results", say=lambda text: None)
    experiments, results = read_experiments(Path(folder)), read_results(clone / "experiments" / "results")
    (line,) = overview(experiments, results)
    assert line == ["tiny", "MLP on digits", "sparse: 97.00 % at 11.00 %", "91.00 ± 1.00 % at 10.00 %"]


def test_names_in_the_list_can_be_copied(clone, capsys):
    name = "a-name-of-some-length-that-a-narrow-terminal-would-cut"
    recipe_of(clone).rename(recipe_of(clone).with_stem(name))
    works("--recipes", str(recipe_of(clone).parent))
    assert name in capsys.readouterr().out


def test_the_page_is_made_of_the_result_files(clone, capsys):
    """Those of the repository, older ones with fewer keys among them."""
    names = ("lambda_moves", "multilevel", "multilevel-rule", "sparse-init")
    results = clone / "experiments" / "results"
    results.mkdir()
    for name in names:
        shutil.copy(CLONE / "experiments" / "results" / f"{name}.json", results)
    arguments = ["--page", "--recipes", str(recipe_of(clone).parent)]
    works(*arguments)
    page = (clone / "docs" / "results.md").read_text()
    assert all(f"## {name}\n" in page for name in names)
    assert "| rescale | 5.00 % | 9.77 %, 6.13 %, 13.39 % | 97.31 ± 0.27 % |" in page
    assert "| 56 coarse, 8 fine | 98.25 ± 0.26 % | 12.5% |" in page
    row = json.loads((results / "multilevel.json").read_text())["rows"][1]
    assert f"({sum(row['flops']) / sum(row['dense_flops']):.0%})" in page
    works(*arguments)
    assert (clone / "docs" / "results.md").read_text() == page
    content = json.loads((results / "lambda_moves.json").read_text())
    for row in content["rows"]:
        row["move"] = row["move"].replace("rescale", "renamed")
    (results / "lambda_moves.json").write_text(json.dumps(content))
    works(*arguments)
    assert (clone / "docs" / "results.md").read_text() == page.replace("rescale", "renamed")


def test_the_page_of_the_repository_is_that_of_its_result_files():
    """docs/results.md, byte for byte."""
    recipes = find_recipes(None)
    results, docs = read_results(recipes.parent / "results"), CLONE / "docs"
    assert results_page(read_experiments(recipes), results, docs) == (docs / "results.md").read_text()


def test_a_damaged_result_file_is_named(clone, capsys):
    (clone / "experiments" / "results").mkdir()
    (clone / "experiments" / "results" / "bad.json").write_text("{")
    assert "bad.json" in fails(capsys, "--page", "--recipes", recipe_of(clone).parent)


def cell(method: str, accuracy: float, std: float, validation: float | None = None, **options) -> dict:
    """A result row at 5 % and 10 epochs unless `options` say otherwise."""
    row = {"method": method, "asked": 0.05, "options": {"epochs": 10} | options,
           "test_accuracy": [accuracy - std, accuracy, accuracy + std],
           "test_accuracy_mean": accuracy, "test_accuracy_std": std}  # fmt: skip
    return row if validation is None else row | {"val_accuracy_mean": validation}


def test_ours_stands_beside_the_rivals_of_its_density_and_epochs():
    ours = [
        cell("AdaBreg 5 %", 0.97, 0.01, 0.9),
        cell("AdaBreg 5 %, multilevel", 0.96, 0.01, 0.95, optimizer="adabreg"),
        cell("AdaBreg 5 %, 30 epochs", 0.99, 0.01, 0.99, epochs=30),
        cell("AdaBreg 5 / 6 %", 0.99, 0.01, 0.99, conv_density=0.06),
    ]
    rivals = [
        cell("RigL 5 %", 0.965, 0.006, 0.99, optimizer="rigl"),
        cell("ProxSGD 5 %", 0.9, 0.01, optimizer="proxsgd"),
    ]
    lines = comparison([*ours, cell("Adam, dense", 0.99, 0.01, 0.99) | {"asked": None}, *rivals]).splitlines()
    assert lines[0] == "| kept | epochs | ours | RigL | ProxSGD | ours is |"
    mine = "| 5.00 % | 10 | AdaBreg 5 %, multilevel: 96.00 ± 1.00 % |"
    assert lines[2:] == [f"{mine} 96.50 ± 0.60 % | 90.00 ± 1.00 % | within a std of the best |"]
    for std, verdict in ((0.0, "0.50 points short"), (0.001, "within a std of the best")):
        near = cell("AdaBreg 5 %", 0.96, 0.00705, 0.9)
        assert verdict in comparison([near, cell("RigL 5 %", 0.965, std, optimizer="rigl")])
    assert "| best |" in comparison([ours[0], rivals[0]])
    assert comparison(ours) == comparison(rivals) == ""


def test_a_row_has_the_lambda_that_runs_ended_with():
    row = Row("sparse", {})
    assert summarise(row, "s", [part(0.5, lam=0.2), part(0.5, lam=0.3)])["lam"] == [0.2, 0.3]
    assert "lam" not in summarise(row, "s", [part(0.5, lam=None)])


def test_what_must_be_said_of_the_data_stands_beside_the_figures(clone):
    note = "20 of the 10,000 test images are approximate."
    experiment = read_experiment(recipe_of(clone))
    rows = [summarise(row, "s", [part(0.5, note=note)]) for row in experiment.rows[:2]]
    assert note in describe(rows[0])
    assert results_page({"tiny": experiment}, {"tiny": {"rows": rows}}).count(note) == 1
    assert "note" not in summarise(experiment.rows[0], "s", [part(0.5, note="")])


@pytest.mark.gpu
def test_the_peak_memory_of_a_run_on_a_gpu_is_that_of_the_gpu():
    kept = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    assert machine.peak_memory(Recipe(device="cuda")) >= kept.nbytes


@pytest.mark.parametrize("jobs", [0, -1, True, 1.5, "two"])
def test_bad_numbers_of_jobs(clone, jobs):
    with pytest.raises(ValueError, match=rf"`jobs`: {jobs!r}; expected a whole number of at least 1"):
        running.reproduce(read_experiment(recipe_of(clone)), clone / "out", jobs=jobs)


def test_several_runs_at_a_time(clone, monkeypatch):
    experiment, out = read_experiment(recipe_of(clone)), clone / "out"
    now, most, lock = [0], [0], threading.Lock()

    def run(runs, data_root, started):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.2)
        with lock:
            now[0] -= 1
        seed = Recipe.read(runs[0] / "recipe.toml").seed
        (runs[0] / "result.json").write_text(json.dumps(part(0.9 + seed / 100)))

    monkeypatch.setattr(running, "run_in_process", run)
    content = running.reproduce(experiment, out, seeds=(0, 1), jobs=3, say=lambda text: None)
    assert most[0] == 3
    assert [row["test_accuracy"] for row in content["rows"]] == [[0.9, 0.91]] * 2
    assert content["environment"]["runs at a time"] == 3
    assert "runs at a time 3" in results_page({"tiny": experiment}, {"tiny": content})


@pytest.mark.parametrize("how", ["an error", "Ctrl-C"])
def test_when_one_of_several_runs_fails_the_others_save_their_state(clone, how, monkeypatch):
    """One child fails at once or Ctrl-C comes; the other, a real one, trains for long and is told to stop."""
    out = clone / "out"
    (clone / "experiments" / "recipes" / "long.toml").write_text(
        'title = "l"\ntask = "t"\nsource = "s"\n[shared]\ndataset = "digits"\nepochs = 100000\n'
        '[[rows]]\nmethod = "good"\n[[rows]]\nmethod = "bad"\n'
    )
    experiment = read_experiment(clone / "experiments" / "recipes" / "long.toml")
    original = running.run_in_process

    def run(runs, data_root, started):
        if runs[0].name.startswith("good"):
            return original(runs, data_root, started)
        good = next(path for path in runs[0].parent.iterdir() if path.name.startswith("good"))
        metrics = good / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            time.sleep(0.05)
        raise RunError("it broke") if how == "an error" else KeyboardInterrupt

    monkeypatch.setattr(running, "run_in_process", run)
    wanted = pytest.raises(RunError, match=r"row 'bad'.*it broke") if how == "an error" else pytest.raises(Stopped)
    with wanted:
        running.reproduce(experiment, out, seeds=(0,), jobs=2, say=lambda text: None)
    good = next(path for path in (out / ".reproduce" / "long").iterdir() if path.name.startswith("good"))
    assert (good / "checkpoint.pt").exists()


# ---------------------------------------------------------------------- what emerges: SSIM, widths, skips


def denoised(ssim: float, widths: list[int], **end) -> dict:
    """What a run of an autoencoder leaves behind."""
    made = part(0.5, widths=widths, full_widths=[8, 8, 8], test_ssim=ssim, val_ssim=ssim - 0.01, **end)
    for key in ("test_accuracy", "val_accuracy"):
        del made["end"][key]
    return made


def test_step_sizes_are_tried_several_at_a_time_and_never_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "__file__", str(tmp_path / "tune.py"))  # it writes beside itself

    def tried(*grid: str) -> list[float]:
        arguments = ("defaults", "--rows", "^digits, AdaBreg", "--jobs", "2", "--grid", *grid)
        monkeypatch.setattr("sys.argv", ["tune.py", *arguments])
        tune.main()
        rows = json.loads((tmp_path / "results" / "tuning" / "defaults.json").read_text())["rows"]
        assert all(0 < row["val_accuracy"] < 1 and row["options"]["epochs"] == 1 for row in rows)
        return [row["options"]["lr"] for row in rows]

    first = tried("lr=0.01,0.02", "epochs=1")
    assert sorted(first) == [0.01, 0.02]
    assert tried("lr=0.02,0.03,0.01", "epochs=1") == [*first, 0.03]


def test_a_table_shows_ssim_widths_and_skips_beside_what_was_published():
    skips = [{"before": 0, "skips": [[0.0, 0.0], [0.5, 0.0]]}, {"before": 2, "skips": [[0.1, 0.0], [-0.5, 0.2]]}]
    gone = [{"before": 0, "skips": [[0.0, 0.0], [0.5, 0.0]]}, {"before": 2, "skips": [[0.0, 0.0], [0.0, 0.0]]}]
    told = Row("sparse", {}, {"ssim": 0.93, "density": 0.267, "note": "100 epochs"})
    parts = [denoised(0.9, [8, 2, 7], skips=skips), denoised(0.94, [6, 2, 8], skips=gone)]
    sparse = summarise(told, "s", parts)
    assert sparse["test_ssim_mean"] == pytest.approx(0.92)
    assert sparse["test_ssim_std"] == pytest.approx(statistics.stdev([0.9, 0.94]))
    assert sparse["widths"] == [[8, 2, 7], [6, 2, 8]]
    assert sparse["skips"] == [skips, gone]
    dense = summarise(Row("dense", {}), "s", [denoised(0.8, [8, 8, 8])] * 2)
    head, _, first, second = table([sparse, dense]).splitlines()
    cells = dict(zip(head.split(" | "), first.split(" | "), strict=True))
    assert cells["SSIM"] == "0.9200 ± 0.0283"
    assert cells["validation SSIM"] == "0.9100 ± 0.0283"
    assert cells["published"] == "SSIM 0.93 at 26.70 %"
    assert cells["alive per layer"] == "7-2-8"  # 7.5 is even
    assert cells["skips alive"] == "2.5 of 6"
    assert dict(zip(head.split(" | "), second.split(" | "), strict=True))["alive per layer"] == "—"  # all of them


def test_the_best_published_ssim_stands_for_its_table(clone):
    recipe_of(clone).write_text(
        TINY.replace("accuracy = 0.97", "ssim = 0.5").replace("accuracy = 0.5", "ssim = 0.6").replace("sgdd", "lasso")
    )
    experiment = read_experiment(recipe_of(clone))
    row = summarise(experiment.rows[2], "s", [denoised(0.9, [8, 2, 8])])
    (line,) = overview({"tiny": experiment}, {"tiny": {"rows": [row]}})
    assert line[2:] == ["from the future: SSIM 0.6 at 90.00 %", "SSIM 0.9000 at 10.00 %"]


def test_without_scikit_image_a_table_with_ssim_says_so(clone, fake, monkeypatch):
    recipe_of(clone).write_text(TINY.replace("accuracy = 0.97", "ssim = 0.97"))
    said: list[str] = []
    for there in (True, False):
        monkeypatch.setattr(running, "find_spec", lambda name, there=there: object() if there else None)
        running.reproduce(read_experiment(recipe_of(clone)), clone / "out", seeds=(0,), say=said.append)
        assert any("torch-bregman[experiments]" in line for line in said) != there


@pytest.mark.parametrize("name", ["mnist-autoencoder", "architecture-search"])
def test_quick_finds_an_architecture(clone, name):
    """The recipes of the repository on 8×8 digits, in one process."""
    text = (CLONE / "experiments" / "recipes" / f"{name}.toml").read_text()
    for data in ("fashion-mnist", "mnist"):
        text = text.replace(f'dataset = "{data}"', 'dataset = "digits"')
    (recipe_of(clone).parent / f"{name}.toml").write_text(text)
    experiment, out = read_experiment(recipe_of(clone).parent / f"{name}.toml"), clone / "quick"
    content = running.reproduce(experiment, out, quick=True, say=lambda text: None)
    for row, options in zip(content["rows"], experiment.rows, strict=True):
        model = options.options["model"]
        if model != "densenet":
            assert row["full_widths"] == [[64] * 6]
            assert -1 <= row["test_ssim"][0] <= 1
            assert len(row["curve"]["val_ssim"]) == 2
        assert (row["widths"] == row["full_widths"]) == (options.options.get("optimizer") in ("adam", "sgd"))
        assert [len(chain["skips"]) for chain in row.get("skips", [[]])[0]] == {
            "autoencoder": [], "skipencoder": [6], "densenet": [4, 4],
        }[model]  # fmt: skip
    page = write_page(clone / "docs", {name: experiment}, out, plots=True)
    assert f"![{experiment.title}](results-{name}.png)" in page.read_text()
    assert 5000 < (clone / "docs" / f"results-{name}.png").stat().st_size < 200_000


# ---------------------------------------------------------------------- variance through depth


@pytest.mark.parametrize(("correction", "factor"), [(True, 1.0), (False, 0.05)])
def test_variance_through_relu_layers(correction, factor):
    options = {"correction": correction, "density": 0.05, "depth": 6, "width": 600, "samples": 100}
    z, gradients, density = variances(options, seed=0)
    assert density == pytest.approx(0.05)
    assert len(z) == len(gradients) == 6
    assert (z[-1] / z[0]) ** (1 / 5) == pytest.approx(factor, rel=0.15)
    assert (gradients[0] / gradients[-1]) ** (1 / 5) == pytest.approx(factor, rel=0.15)
    if correction:
        assert z[0] == pytest.approx(2.0, rel=0.15)  # gain² times E[x²]


def test_the_variance_table(clone, capsys):
    recipe_of(clone).write_text(
        HEAD + 'kind = "variance"\n[shared]\ndensity = 0.1\ndepth = 3\nwidth = 60\n'
        '[[rows]]\nmethod = "with"\n[[rows]]\nmethod = "without"\ncorrection = false\n'
    )
    works("tiny", "--seeds", "0", "1", "--plots", "--recipes", str(recipe_of(clone).parent))
    rows = json.loads((clone / "experiments" / "results" / "tiny.json").read_text())["rows"]
    assert [len(row["activations"]) for row in rows] == [3, 3]
    assert rows[0]["gradient_factor_mean"] > 5 * rows[1]["gradient_factor_mean"]
    assert (clone / "docs" / "results-tiny.png").stat().st_size < 200_000
    recipe_of(clone).write_text(HEAD + 'kind = "variance"\n[[rows]]\nmethod = "with"\nnonlinearity = "sine"\n')
    assert "Invalid `nonlinearity`" in fails(capsys, "tiny", "--recipes", recipe_of(clone).parent)


def test_a_row_without_a_curve_in_one_panel_keeps_its_colour_and_stands_in_the_legend():
    figure_module = pytest.importorskip("matplotlib.figure")
    figure = figure_module.Figure()
    early = {"val_accuracy": [0.1, 0.9], "density": [0.01, 0.05]}
    rows = [{"method": "old", "curve": early}, {"method": "new", "curve": {**early, "l1_norm": [10.0, 100.0]}}]
    assert draw_curves(figure, rows)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["old", "new"]
    accuracy, _, norm = figure.axes
    assert norm.lines[0].get_color() == accuracy.lines[1].get_color() != accuracy.lines[0].get_color()


def test_a_method_has_one_colour_at_all_its_densities():
    figure_module = pytest.importorskip("matplotlib.figure")
    figure = figure_module.Figure()
    rows = [
        {"method": f"{method} {density} %", "kept": [density / 100] * 2, "test_accuracy_mean": accuracy,
         "test_accuracy_std": 0.01, "curve": {"val_accuracy": [0.1, accuracy], "density": [1.0, density / 100]}}
        for method, density, accuracy in [("RigL", 5, 0.9), ("SET", 5, 0.8), ("RigL", 2, 0.85)]
    ]  # fmt: skip
    assert draw_curves(figure, rows)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["RigL", "SET"]
    kept, accuracy, _ = figure.axes
    assert kept.get_xlabel() == "weights kept, %"
    rigl, set_ = (line for line in kept.lines if len(line.get_xdata()) and line.get_marker() == "o")
    assert list(rigl.get_xdata()) == [2, 5]
    assert list(rigl.get_ydata()) == [85, 90]
    five, other, two = accuracy.lines
    assert five.get_color() == two.get_color() == rigl.get_color() != other.get_color() == set_.get_color()
    assert five.get_linestyle() != two.get_linestyle()


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("RigL 2 %", "RigL"),
        ("AdaBreg 3.4 %, multilevel", "AdaBreg, multilevel"),
        ("AdaBreg 3.45 / 3.95 %, multilevel, 30 epochs", "AdaBreg, multilevel, 30 epochs"),
        ("LinBreg, λ 1e-1", "LinBreg, λ 1e-1"),
    ],
)
def test_the_name_of_a_method_without_its_density(method, name):
    assert family(method) == name
