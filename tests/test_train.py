"""The main job: a run from the command line, its folder, its end, and what goes wrong."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import torch_bregman as tb
from torch_bregman.models import MODELS, build
from torch_bregman.models.resnet import ResNet
from torch_bregman.train import Recipe, fit
from torch_bregman.train.checksummed import latest_checkpoint, load_checkpoint, previous, save_checkpoint
from torch_bregman.train.errors import RunError, Stopped
from torch_bregman.train.trial import least_samples, try_out


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def arrays(tmp_path_factory) -> Path:
    """A small task on disk: five classes that are linear in 20 features."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(700, 20)).astype(np.float32)
    y = (x[:, :5] + 0.1 * rng.normal(size=(700, 5))).argmax(1)
    path = tmp_path_factory.mktemp("data") / "task.npz"
    np.savez(path, x_train=x[:600], y_train=y[:600], x_test=x[600:], y_test=y[600:])
    return path


def small(arrays: Path, **options) -> Recipe:
    return Recipe(dataset=str(arrays), **{"epochs": 4, "batch_size": 50, "density": 0.1, **options}).check()


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last.safetensors")


# ---------------------------------------------------------------------- a whole run


def test_the_main_job_on_digits(command, inside, tmp_path):
    done = command("train", "digits", "--epochs", 40, "--compare")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "asked 5.00 %" in done.stdout
    lines = done.stdout.splitlines()
    (twin,) = [i for i, line in enumerate(lines) if line.startswith("dense twin: ")]
    assert lines[twin + 2].split()[0] == "40"  # its last epoch, and no other
    assert lines[twin + 3].startswith("╭")
    assert "matrix entries" not in done.stdout  # all of them are counted
    (run,) = (tmp_path / "runs").iterdir()
    *rows, end = rows_of(run)
    assert [row["epoch"] for row in rows] == list(range(41))
    assert {"train_loss", "val_accuracy", "density", "lam", "seconds"} <= rows[-1].keys()
    assert rows[0]["density"] < 0.012
    assert end["event"] == "end"
    assert end["asked_density"] == 0.05
    assert abs(end["density"] / 0.05 - 1) <= 0.01
    assert rows[-1]["density"] == 0.05
    assert end["test_accuracy"] > 0.9
    assert rows_of(run / "dense")[-1]["density"] == 1.0
    assert (run / "report.html").stat().st_size > 50_000
    assert set(np.load(run / "patterns.npz").files) == {
        f"{when}/{i}.weight" for when in ("start", "middle", "end") for i in (1, 3, 5)
    }
    best = load_file(run / "best.safetensors")
    assert sum(int(w.count_nonzero()) for n, w in best.items() if n.endswith("weight")) == end["kept"]
    assert list((run / "tensorboard").iterdir())

    again = inside("train", "--config", run / "recipe.toml", "--out", "again", "--quiet")
    assert again.returncode == 0, again.stderr
    assert rows_of(tmp_path / "again")[-1]["test_accuracy"] == end["test_accuracy"]
    for name, weight in weights_of(run).items():
        assert torch.equal(weight, weights_of(tmp_path / "again")[name])


@pytest.mark.parametrize("optimizer", ["adabreg", "linbreg"])
@pytest.mark.parametrize("density", [0.3, 0.05, 0.01])
def test_asked_is_got(arrays, tmp_path, optimizer, density):
    end = fit(small(arrays, optimizer=optimizer, density=density), tmp_path, quiet=True)
    assert abs(end["density"] / density - 1) <= 0.01


@pytest.mark.parametrize("multilevel", [False, True])
@pytest.mark.parametrize("optimizer", ["adabreg", "linbreg"])
@pytest.mark.parametrize("model", ["mlp", "convnet"])
def test_asked_is_got_in_runs_of_a_few_steps(tmp_path, model, optimizer, multilevel):
    """λ rises fast there, and with `multilevel` weights that it had left behind were taken for edits."""
    for steps in (2, 3, 5, 20):
        recipe = Recipe(
            dataset="digits", model=model, optimizer=optimizer, density=0.05, multilevel=multilevel, epochs=1,
            batch_size=32, limit=32 * steps,
        ).check()  # fmt: skip
        assert fit(recipe, tmp_path / str(steps), quiet=True)["density"] == pytest.approx(0.05, rel=0.01)


@pytest.mark.parametrize(
    "options", [{}, {"regularizer": "group-l1", "groups": "kernels"}, {"multilevel": True, "coarse_steps": 3}]
)
def test_linear_and_conv_weights_with_densities_of_their_own(tmp_path, options):
    recipe = Recipe(
        dataset="digits", model="convnet", density=0.03, conv_density=0.1, epochs=2, limit=512, **options
    ).check()
    end = fit(recipe, tmp_path, quiet=True)
    assert end["kept_linear"] == pytest.approx(0.03, rel=0.02)
    weights = {name: w for name, w in weights_of(tmp_path).items() if w.dim() > 1}
    conv = torch.cat([w.flatten() for w in weights.values() if w.dim() == 4])
    size = sum(w.numel() for w in weights.values())
    assert conv.count_nonzero() / conv.numel() == pytest.approx(0.1, rel=0.02)
    assert end["asked_density"] == pytest.approx((0.03 * (size - len(conv)) + 0.1 * len(conv)) / size)
    assert rows_of(tmp_path)[-2]["l1_norm"] == pytest.approx(sum(w.abs().sum().item() for w in weights.values()))


def test_a_network_for_which_channels_last_is_not_safe(tmp_path, monkeypatch):
    """Shortcuts of four channels: a crash of oneDNN on machines with AVX2 (its issue 6035)."""
    monkeypatch.setitem(MODELS, "narrow", lambda shape, classes: ResNet(shape[0], classes, width=4))
    recipe = Recipe(dataset="digits", model="narrow", optimizer="adam", epochs=3, limit=512).check()
    fit(recipe, tmp_path, quiet=True)
    _, first, *_, last, _ = rows_of(tmp_path)
    assert last["train_loss"] < 0.9 * first["train_loss"]


@pytest.mark.parametrize(
    "options",
    [
        {"model": "convnet", "regularizer": "group-l1"},
        {"model": "convnet", "regularizer": "sparse-group-l1", "groups": "filters", "density": 0.3},
        {"model": "mlp", "regularizer": "group-l1", "groups": "columns", "density": 0.3},
        {"model": "mlp", "regularizer": "nonnegative-l1"},
        {"model": "mlp", "regularizer": "nuclear", "lam": 0.5, "density": None},
        {"model": "mlp", "optimizer": "linbreg", "momentum": 0.9, "lr": 0.05},
        {"model": "mlp", "optimizer": "proxsgd"},
        {"model": "mlp", "optimizer": "sgd", "density": None},
        {"model": "mlp", "control": "exact"},
        {"model": "mlp", "lam": 0.2, "density": None},
        {"model": "mlp", "schedule": "plateau"},
        {"model": "mlp", "schedule": "constant", "weight_decay": 1e-4, "delta": 2.0},
        {"model": "mlp", "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"model": "mlp", "augment": "shift"},
        {"model": "mlp", "precision": "bf16"},
        {"model": "autoencoder", "regularizer": "group-l1", "density": 0.2},
        {"model": "resnet18", "limit": 64, "batch_size": 32, "epochs": 1, "threads": 1},
        {"model": "mlp", "multilevel": True},
        {"model": "mlp", "multilevel": True, "coarse_steps": 5, "fine_steps": 2, "boost": 2.0, "margin": 0.5},
        {"model": "convnet", "multilevel": True, "coarse_steps": 3, "optimizer": "linbreg", "lr": 0.1},
        {
            "model": "convnet",
            "multilevel": True,
            "coarse_steps": 3,
            "regularizer": "group-l1",
            "groups": "filters",
            "density": 0.3,
        },
        {"model": "mlp", "multilevel": True, "coarse_steps": 3, "regularizer": "nuclear", "lam": 0.5, "density": None},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_option_trains(tmp_path, options):
    recipe = Recipe(dataset="digits", **{"epochs": 2, "density": 0.1, "limit": 512, **options}).check()
    end = fit(recipe, tmp_path, quiet=True)
    rows = rows_of(tmp_path)
    assert rows[-1] == end
    assert rows[-2]["train_loss"] < 10
    if recipe.regularizer == "l1" and recipe.density and recipe.optimizer != "proxsgd":
        assert abs(end["density"] / recipe.density - 1) <= 0.01
    if options["model"] == "autoencoder":
        assert "test_accuracy" not in end
        assert end["test_loss"] > 0
    if recipe.regularizer == "nonnegative-l1":
        assert all((w >= 0).all() for n, w in weights_of(tmp_path).items() if n.endswith("weight"))


def test_a_model_of_ones_own(inside, tmp_path, arrays):
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\ndef make(shape, classes):\n    return nn.Linear(shape[0], classes)\n"
    )
    done = inside("train", arrays, "--model", "mynet:make", "--epochs", 2, "--density", "0.5")
    assert done.returncode == 0, done.stderr
    assert rows_of(next((tmp_path / "runs").iterdir()))[-1]["weights"] == 100


def test_a_model_and_data_of_the_current_folder_are_found_by_the_command(tmp_path):
    """-P: the folder is not on the path of Python, as in the command that pip writes."""
    lines = "import numpy, torch\ndef make(shape, classes):\n    return torch.nn.Linear(shape[0], classes)\n"
    lines += "def data():\n    return {'x': numpy.random.rand(60, 4), 'y': numpy.arange(60) % 3}\n"
    (tmp_path / "mynet.py").write_text(lines)
    script = "from torch_bregman.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, "train", "mynet:data", "--model", "mynet:make", "--epochs", "1"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nonet:make", ["No module named 'nonet' in ", "PYTHONPATH"]),
        ("own.nonet:make", ["No module named 'own.nonet'"]),
        ("own.needs:make", ["ModuleNotFoundError, No module named 'nonsense'", "needs.py, line 1"]),
        ("own.broken:make", ["SyntaxError"]),
        ("own.fine:other", ["own.fine has no 'other'"]),
        ("own.fine:NUMBER", ["NUMBER is int"]),
        ("own.fine:", ["has no ''"]),
        (":make", ["expected package.module:function"]),
        (".fine:make", ["expected package.module:function"]),
        ("own.fine:make", ["TypeError, make() takes 0 positional arguments"]),
        ("own.fine:fails", ["ZeroDivisionError", "fine.py, line 5"]),
        ("own.fine:lazy", ["weight has no values, it is lazy"]),
        ("own.fine:meta", ["weight has no values, it is on the meta device"]),
        ("own.fine:number", ["returned int; expected a torch.nn.Module"]),
    ],
)
def test_what_is_wrong_with_a_model_of_ones_own(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "needs.py").write_text("import nonsense\n")
    (tmp_path / "own" / "broken.py").write_text("def make(:\n")
    (tmp_path / "own" / "fine.py").write_text(
        "NUMBER = 3\ndef make():\n    pass\ndef fails(shape, classes):\n    1 / 0\ndef number(*_):\n    return 3\n"
        "from torch import nn\nlazy = lambda *_: nn.LazyLinear(3)\nmeta = lambda *_: nn.Linear(4, 3, device='meta')\n"
    )
    before = list(sys.path)
    with pytest.raises(ValueError, match=r"Invalid `model`") as error:
        build(name, (4,), 3)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert sys.path == before
    for module in [module for module in sys.modules if module == "own" or module.startswith("own.")]:
        del sys.modules[module]


# ---------------------------------------------------------------------- networks that do not fit


def normed(shape, classes):
    return nn.Sequential(nn.Linear(*shape, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, classes))


def double(shape, classes):
    return nn.Sequential(nn.Linear(*shape, 30), nn.Dropout(), nn.Linear(30, classes)).double()


class Odd(nn.Module):
    """A Linear layer, and `change` of its outputs, which also knows whether it trains."""

    def __init__(self, shape, classes, change):
        super().__init__()
        self.layer, self.change = nn.Linear(*shape, classes), change

    def forward(self, x):
        return self.change(self.layer(x), self.training)


ODD = {
    "few": lambda out, training: out[:, :2],
    "tuple": lambda out, training: (out, out),
    "dict": lambda out, training: {"logits": out, "loss": out},
    "trains": lambda out, training: (out, out) if training else out,
    "images": lambda out, training: out[..., None, None],
    "whole": lambda out, training: out.argmax(1),
    "raises": lambda out, training: out @ out,
    "detached": lambda out, training: out.detach(),
}


def __getattr__(name):  # odd_few and so on
    if name.removeprefix("odd_") in ODD:
        return lambda shape, classes: Odd(shape, classes, ODD[name.removeprefix("odd_")])
    raise AttributeError(name)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("few", ["in eval mode, on 2 samples, returns 2 outputs for 5 classes", "logits [2, 5]"]),
        ("tuple", ["returns a tuple; expected one tensor"]),
        ("dict", ["returns a dict of logits, loss"]),
        ("trains", ["in training mode", "returns a tuple"]),
        ("images", ["the shape [2, 5, 1, 1]"]),
        ("whole", ["torch.int64", "floating point"]),
        ("detached", ["returns what no parameter can change"]),
        ("raises", ["fails on samples of shape [20]: RuntimeError, mat1", "test_train.py, line"]),
    ],
)
def test_a_network_that_does_not_fit_is_told_before_the_run(inside, tmp_path, arrays, model, words):
    done = inside("train", arrays, "--model", f"test_train:odd_{model}", "--epochs", 1)
    assert done.returncode == 1
    assert all(word in done.stderr for word in [f"'test_train:odd_{model}'", *words]), done.stderr
    assert done.stderr.count("\n") == 1
    assert not list((tmp_path / "runs").glob("*"))


def test_the_trial_leaves_no_trace(tmp_path):
    model, x = normed((20,), 5), torch.randn(2, 20)
    model.insert(0, nn.Dropout())
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    try_out("model", model, x, 5)
    assert least_samples(model, x) == 2
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.training
    assert least_samples(nn.Sequential(nn.Unflatten(1, (1, 20)), nn.BatchNorm1d(1)), x) == 1  # of one: 20 values
    assert least_samples(nn.Linear(20, 5), x) == 1


class Table(nn.Module):
    """A matrix that is no weight of a layer."""

    def __init__(self, shape, classes):
        super().__init__()
        self.layer, self.table = nn.Linear(*shape, classes), nn.Parameter(torch.zeros(*shape, classes))

    def forward(self, x):
        return self.layer(x) + x @ self.table


def test_what_no_density_counts_is_said(inside, tmp_path, arrays):
    with pytest.warns(UserWarning, match="matrix entries"):
        done = inside("train", arrays, "--model", "test_train:Table", "--epochs", 1, "--density", 0.3, "--out", "r")
    assert done.returncode == 0, done.stderr
    assert "100 of 200 matrix entries are counted, without table" in done.stdout.splitlines()[1]
    assert "100 of 200 matrix entries" in rows_of(tmp_path / "r")[-1]["uncounted"]


def test_images_that_are_left_out_are_said(inside, tmp_path):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for k in range(10):
            pixels = np.random.RandomState(k).randint(0, 256, (4, 6)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "animals" / name / f"{k}.png")
    (tmp_path / "animals" / "dog" / "a.heic").write_bytes(b"")
    done = inside("train", "animals", "--epochs", 1, "--optimizer", "adam", "--out", "r")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "left out of dog/: 1 .heic"
    assert "note" in done.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--augment", "shift"], ["`augment`: 'shift' is for images", "[20]"]),
        (["--seed", 10**20], ["`seed`"]),
    ],
)
def test_options_that_do_not_fit_leave_no_run(inside, tmp_path, arrays, options, words):
    done = inside("train", arrays, *options, "--epochs", 1)
    assert done.returncode == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert not list((tmp_path / "runs").glob("*"))


def test_a_batch_norm_needs_two_samples(inside, tmp_path, arrays):
    done = inside("train", arrays, "--model", "test_train:normed", "--batch-size", 1)
    assert done.returncode == 1
    assert "Invalid `batch_size`: 1, of 540 samples to train on; expected at least 2" in done.stderr


def test_networks_in_float64_are_trained_and_used(inside, tmp_path, arrays):
    done = inside("train", arrays, "--model", "test_train:double", "--epochs", 1, "--density", 0.3, "--out", "r")
    assert done.returncode == 0, done.stderr
    assert weights_of(tmp_path / "r")["0.weight"].dtype == torch.float64
    for use in (["shrink"], ["export", "--format", "program"]):
        done = inside(*use, "r")
        assert done.returncode == 0, done.stderr


def test_models_have_the_sizes_of_the_paper():
    def size(name, shape):
        model = build(name, shape, 10)
        assert model(torch.zeros(2, *shape)).shape == ((2, *shape) if name.endswith("encoder") else (2, 10))
        return sum(p.numel() for p in model.parameters())

    assert set(MODELS) == {"mlp", "convnet", "resnet18", "autoencoder", "skipencoder", "densenet"}
    assert size("mlp", (1, 28, 28)) == 784 * 200 + 200 + 200 * 80 + 80 + 80 * 10 + 10
    assert size("convnet", (1, 28, 28)) == 64 * 26 + 64 * (1600 + 1) + 1024 * 128 + 128 + 1290
    assert size("autoencoder", (1, 28, 28)) == 6 * 784 * 785
    assert size("skipencoder", (1, 28, 28)) == 6 * 784 * 785 + 6 * 6
    assert size("densenet", (1, 28, 28)) == 16 * 10 + 9 * 16 * (16 * 9 + 1) + 2 * 4 * 4 + 170
    assert round(size("resnet18", (3, 32, 32)) / 1e6, 2) == 11.17


def test_the_best_model_is_on_target_and_from_the_validation_data(arrays, tmp_path):
    end = fit(small(arrays, epochs=12), tmp_path, quiet=True)
    rows = rows_of(tmp_path)[:-1]
    eligible = [row for row in rows[1:] if abs(row["density"] / 0.1 - 1) <= 0.01]
    assert end["best_epoch"] == max(eligible, key=lambda row: (row["val_accuracy"], row["epoch"]))["epoch"]


# ---------------------------------------------------------------------- killed and resumed


@pytest.mark.parametrize(
    "options",
    [{"optimizer": "adam", "density": None}, {}, {"optimizer": "set"}, {"multilevel": True, "coarse_steps": 3}],
)
def test_what_training_would_cost_if_zeros_were_free(arrays, tmp_path, options):
    end = fit(small(arrays, **options), tmp_path / "run", quiet=True)
    samples, (first, *rest) = 540 * 4, rows_of(tmp_path / "run")[:-1]  # a tenth is for validation
    forward = {"1.weight": 2 * 20 * 200, "3.weight": 2 * 200 * 80, "5.weight": 2 * 80 * 5}
    dense = samples * sum(forward.values())
    sparse = 0.0
    for before, after in zip([first, *rest], rest, strict=False):
        densities = {name: (before["layers"][name] + after["layers"][name]) / 2 for name in forward}
        sparse += samples / 4 * sum(densities[name] * flops for name, flops in forward.items())
    steps = end.get("fine_steps", 44) + end.get("coarse_steps", 0)
    fine = end.get("fine_steps", 44) / steps
    assert (steps, fine < 1) == (44, "multilevel" in options)
    expected = (3 - fine) * sparse + fine * dense
    if "optimizer" in options:  # SET has one density at all times, and never needs a dense gradient
        expected = 3 * dense if options["optimizer"] == "adam" else 3 * 0.1 * dense
    assert end["sparse_flops"] == pytest.approx(expected, rel=1e-3)


def test_resume_after_sigkill_at_random_points_is_bit_exact(inside, arrays, tmp_path):
    options = ["--epochs", "30", "--batch-size", "10", "--density", "0.1", "--quiet", "--seed", "3"]
    script = "import sys; from torch_bregman.train import loop; loop.SAVE_EVERY = loop.LOOK_EVERY = 0.02\n"
    script += "from torch_bregman.cli import main; main(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}

    def start(*args):
        return subprocess.Popen(
            [sys.executable, "-c", script, "train", *map(str, args)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    rng, killed = random.Random(0), 0
    run = tmp_path / "killed"
    process = start(arrays, *options, "--out", run)
    while not (run / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    for _ in range(3):
        time.sleep(rng.uniform(0.0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        seen = len(rows_of(run))
        process = start("--resume", run, "--quiet")
        while process.poll() is None and len(rows_of(run)) <= seen:
            time.sleep(0.01)
    whole = inside("train", arrays, *options, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 0, err
    assert killed >= 2
    for name, weight in weights_of(tmp_path / "whole").items():
        assert torch.equal(weight, weights_of(run)[name]), name
    same = ("train_loss", "val_accuracy", "density", "lam", "layers")
    a, b = rows_of(tmp_path / "whole"), rows_of(run)
    assert [[row.get(k) for k in same] for row in a] == [[row.get(k) for k in same] for row in b]
    assert a[-1]["test_accuracy"] == b[-1]["test_accuracy"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "linbreg", "momentum": 0.5},
        {"schedule": "plateau"},
        {"control": "exact"},
        {"precision": "bf16"},
        {"multilevel": True, "coarse_steps": 3, "margin": 1.0},
        {"model": "test_train:normed", "batch_size": 49},  # of 540 samples one is left, which joins the last batch
        {"model": "test_train:double"},
    ],
    ids=str,
)
def test_stopping_in_the_middle_of_an_epoch_and_going_on(arrays, tmp_path, monkeypatch, stop_after, options):
    for name in ("FASTER", "ABLE"):  # timings of two runs differ, and then the last bits do
        monkeypatch.setattr(f"torch_bregman.multilevel.choice.{name}", 0.0)
    recipe = small(arrays, **options)
    fit(recipe, tmp_path / "whole", quiet=True)
    stop_after(tb.TargetDensity, 5, 20, 31)
    for _ in range(3):
        with pytest.raises(Stopped, match="Stopped at epoch"):
            fit(recipe, tmp_path / "parts", quiet=True)
    fit(recipe, tmp_path / "parts", quiet=True)
    for name, weight in weights_of(tmp_path / "whole").items():
        assert torch.equal(weight, weights_of(tmp_path / "parts")[name]), name


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    process = subprocess.Popen(
        [sys.executable, "-m", "torch_bregman.cli", "train", "digits", "--epochs", "100000", "--out", "r"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "r" / "metrics.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "torch-bregman train --resume r" in out
    assert "Traceback" not in err
    assert (tmp_path / "r" / "checkpoint.pt").exists()
    assert (tmp_path / "r" / "report.html").exists()


def test_a_run_that_has_ended_is_not_trained_again(inside, arrays, tmp_path):
    first = inside("train", arrays, "--epochs", 2, "--out", "r", "--density", "0.2")
    assert first.returncode == 0, first.stderr
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    second = inside("train", "--out", "r", "--resume")
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before


# ---------------------------------------------------------------------- files


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1, "w": torch.ones(1000)})
    save_checkpoint(path, {"step": 2, "w": torch.ones(1000)})
    assert load_checkpoint(path)["step"] == 2
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", whole[:900] + bytes([whole[900] ^ 1]) + whole[901:]):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=rf"checkpoint {re.escape(str(path))} is damaged"):
            load_checkpoint(path)
        said = []
        assert latest_checkpoint(path, said.append)["step"] == 1
        assert str(path) in said[0]
    previous(path).write_bytes(b"x" * 99)
    with pytest.raises(RunError, match="damaged"):
        latest_checkpoint(path, said.append)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match=r"Could not write .*No space left on device"):
        save_checkpoint(path, {"step": 2})
    monkeypatch.undo()
    assert latest_checkpoint(path, print)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_file_size_limit_stops_the_run_with_a_sentence(inside):
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        done = inside("train", "digits", "--epochs", 3, "--out", "r")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert done.returncode == 1
    assert re.search(r"Error: .*(File too large)", done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_stops_at_its_step(arrays, tmp_path, monkeypatch):
    monkeypatch.setattr("torch_bregman.train.loop.SAVE_EVERY", 0.0)
    original, count = tb.TargetDensity.step, [0]

    def step(self):
        original(self)
        count[0] += 1
        if count[0] == 30:
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    p.data.fill_(float("nan"))

    monkeypatch.setattr(tb.TargetDensity, "step", step)
    with pytest.raises(RunError, match=r"loss became nan at step 31; the last good checkpoint"):
        fit(small(arrays), tmp_path, quiet=True)
    saved = load_checkpoint(tmp_path / "checkpoint.pt")
    assert all(w.isfinite().all() for w in saved["model"].values())


def test_the_recipe_is_the_run(tmp_path):
    recipe = Recipe(dataset="mnist", density=0.02, seed=4).check()
    recipe.write(tmp_path / "r.toml")
    assert Recipe.read(tmp_path / "r.toml") == recipe
    values = tomllib.loads((tmp_path / "r.toml").read_text())
    assert values["lr"] == recipe.lr
    assert values["augment"] == "shift"
    (tmp_path / "bad.toml").write_text("densty = 0.1")
    with pytest.raises(ValueError, match=r"'densty'.*did you mean 'density'"):
        Recipe.read(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text("density = ")
    with pytest.raises(ValueError, match=r"Cannot read the recipe .*bad.toml"):
        Recipe.read(tmp_path / "bad.toml")


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["digits", "--density", "5"], r"`density`: 5.0; .*for 5 % write 0.05"),
        (["digits", "--density", "0"], r"`density`: 0.0"),
        (["digits", "--density", "nan"], r"`density`: nan"),
        (["digits", "--lr", "-1"], r"`lr`: -1.0"),
        (["digits", "--lr", "nan"], r"`lr`: nan"),
        (["digits", "--lam", "-1"], r"`lam`: -1.0"),
        (["digits", "--delta", "0"], r"`delta`: 0.0"),
        (["digits", "--momentum", "1"], r"`momentum`: 1.0"),
        (["digits", "--optimizer", "linbreg", "--decoupled-weight-decay"], r"`decoupled_weight_decay`: True; linbreg"),
        (["digits", "--epochs", "0"], r"`epochs`: 0"),
        (["digits", "--batch-size", "0"], r"`batch_size`: 0"),
        (["digits", "--optimizer", "adabrek"], r"'adabrek'.*did you mean 'adabreg'"),
        (["digits", "--regularizer", "l2"], r"`regularizer`: 'l2'; expected one of 'l1'"),
        (["digits", "--model", "resnet19"], r"`model`: 'resnet19'.*did you mean 'resnet18'"),
        (["digits", "--model", "nowhere:make"], r"`model`: 'nowhere:make'.*No module named 'nowhere' in"),
        (["digits", "--groups", "kernel"], r"'kernel'.*did you mean 'kernels'"),
        (["digits", "--schedule", "cos"], r"'cos'.*did you mean"),
        (["digits", "--augment", "flip"], r"'flip'"),
        (["digits", "--device", "cuda:77"], r"`device`: 'cuda:77'"),
        (["digits", "--optimizer", "adam", "--density", "0.1"], r"`density`: 0.1; adam trains dense"),
        (["digits", "--regularizer", "nuclear"], r"low rank"),
        (["mnist", "--model", "skipencode"], r"`model`: 'skipencode'.*skipencoder"),
        (["digits", "--timeout", "-3"], r"`timeout`: -3"),
        (["digits", "--model", "convnet", "--conv-density", "3"], r"`conv_density`: 3.0; .*for 3 % write 0.03"),
        (["digits", "--conv-density", "0.1"], r"`conv_density`: 0.1; mlp has not both Linear and Conv layers"),
        (["digits", "--conv-density", "0.1", "--lam", "0.1"], r"`conv_density`: 0.1; it needs `density`"),
        (["digits", "--conv-density", "0.1", "--optimizer", "gmp"], r"`conv_density`: 0.1; gmp has one density"),
        (["digits", "--multilevel", "--optimizer", "adam"], r"`multilevel`: True; adam has no dual"),
        (["digits", "--multilevel", "--coarse-steps", "-1"], r"`coarse_steps`: -1"),
        (["digits", "--multilevel", "--cuda-graphs"], r"`cuda_graphs`: True; multilevel training exchanges"),
        (["mnst"], r"mnst.*mnist"),
        (["nothere.npz"], r"nothere.npz"),
        (["digits", "--densty", "0.1"], r"Did you mean --density"),
        (["digits", "--config", "nothere.toml"], r"nothere.toml.*does not exist"),
        (["--resume", "nothere"], r"nothere is no run folder"),
        (["--resume"], r"needs the run folder"),
        (["mnist", "--data-root", "."], r"mnist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(args, message, tmp_path, monkeypatch, capsys):
    from torch_bregman.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        main(["train", *args])
    assert stop.value.code not in (0, None)
    said = capsys.readouterr().err
    assert re.search(message, " ".join(said.replace("│", " ").split())), said
    assert "Traceback" not in said


def test_a_run_folder_that_exists_is_left_alone(inside, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "precious").write_text("x")
    done = inside("train", "digits", "--out", "r")
    assert done.returncode == 1
    assert "r exists; go on with --resume r, or choose another --out" in done.stderr
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["precious"]


def test_a_truncated_data_file_is_named(inside, tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not really")
    done = inside("train", "bad.npz")
    assert done.returncode == 1
    assert "bad.npz" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").iterdir())  # no empty run is left behind


def test_help_teaches(inside):
    done = inside("train", "--help")
    assert done.returncode == 0
    for word in ("--density", "--resume", "--compare", "0.05 for 5 %", "torch-bregman train mnist --density 0.02"):
        assert word in " ".join(done.stdout.split())
    assert "--dataset" not in done.stdout  # it stands first; files of --config have it
    named = set(re.findall(r"runs/([a-z][\w.%-]+)", done.stdout))
    assert named == {"mnist-mlp-adabreg-0.05"}
