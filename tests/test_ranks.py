"""Several processes train what one process trains."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from several import free_port, outcome, together, torchrun

from torch_bregman.train import Recipe, fit
from torch_bregman.train.ranks import Processes, start

CASES = {
    "short last batch": {"limit": 129},  # of 64 + 64 + 1 samples: nothing is left for the second rank
    "autoencoder": {"model": "autoencoder", "regularizer": "group-l1", "density": 0.2},
    "convnet": {"model": "convnet", "augment": "shift", "optimizer": "linbreg", "control": "exact", "epochs": 1},
    "plateau": {"schedule": "plateau", "weight_decay": 1e-4},
    "gmp": {"optimizer": "gmp", "density": 0.2},
    "multilevel": {"multilevel": True, "coarse_steps": 3, "margin": 1.0},
    "adam": {"optimizer": "adam", "density": None},
}


def recipe(options: dict) -> Recipe:
    return Recipe(**{"epochs": 2, "density": 0.1, "limit": 300, "batch_size": 64, "threads": 1, **options}).check()


def train_all(folder: str) -> None:
    """What each rank does."""
    with start("ddp", recipe({}), 60.0) as ranks:
        for name, options in CASES.items():
            fit(recipe(options), Path(folder) / name, quiet=True, ranks=ranks)


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    together("test_ranks", "train_all", 2, folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_what_one_process_trains(trained, tmp_path, name):
    end = fit(recipe(CASES[name]), tmp_path, quiet=True)
    *rows, other = rows_of(trained / name)
    for mine, theirs in zip(rows_of(tmp_path), [*rows, other], strict=True):
        assert theirs.keys() == mine.keys()
        for key in {"train_loss", "val_loss", "val_accuracy", "density", "lam", "test_loss"} & mine.keys():
            if mine[key] is not None:
                assert theirs[key] == pytest.approx(mine[key], rel=1e-4), (mine.get("epoch"), key)
    assert other["kept"] == end["kept"]
    for file in ("last", "best"):
        weights = load_file(tmp_path / f"{file}.safetensors")
        theirs = load_file(trained / name / f"{file}.safetensors")
        assert weights.keys() == theirs.keys()
        for key, weight in weights.items():
            assert torch.equal(weight == 0, theirs[key] == 0), key
            torch.testing.assert_close(theirs[key], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("samples", [1, 2, 3, 10, 64])
def test_every_sample_counts_once(size, samples):
    x = torch.arange(samples, dtype=torch.float64)
    seen, total = [], 0.0
    for rank in range(size):
        ranks = Processes("ddp", rank, size)
        (part,) = ranks.part(x)
        seen += part[: ranks.count(samples)].tolist()
        assert len(part) == max(ranks.count(samples), 1)
        total += ranks.weigh(part.mean(), samples).item() / size
    assert seen == x.tolist()
    assert total == pytest.approx(x.mean().item())


@pytest.mark.parametrize(
    ("args", "environment", "message"),
    [
        (
            ["digits", "--strategy", "ddp"],
            {},
            r"needs torchrun: torchrun --standalone --nproc-per-node 2 -m torch_bregman train digits --strategy ddp",
        ),
        (["digits"], {"WORLD_SIZE": "2", "RANK": "0"}, "torchrun has started 2 processes.*add --strategy ddp"),
        (["digits", "--strategy", "fsdp", "--multilevel"], {}, "'fsdp'; --multilevel .* use --strategy ddp"),
        (["digits", "--strategy", "fsdp", "--optimizer", "rigl"], {}, "'fsdp'; rigl .* use --strategy ddp"),
        (["digits", "--strategy", "fsdp", "--precision", "fp16"], {}, "'fsdp'.*use bf16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_go_together_is_one_sentence(args, environment, message, tmp_path, monkeypatch, capsys):
    from torch_bregman.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["torch-bregman", "train", *args])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        main(["train", *args])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert not list(tmp_path.iterdir())


def test_the_command_under_torchrun(tmp_path):
    job = torchrun(
        tmp_path, "train", "digits", "--strategy", "ddp", "--epochs", 2, "--compare", "--quiet", "--out", "r"
    )
    said = outcome(job)
    assert job.returncode == 0, said
    assert said.count("asked 5.00 %") == 1  # one rank speaks
    assert "Warning" not in said
    assert rows_of(tmp_path / "r")[-1]["event"] == "end"
    assert rows_of(tmp_path / "r" / "dense")[-1]["density"] == 1.0
    assert (tmp_path / "r" / "report.html").exists()


@pytest.mark.slow
def test_two_machines(tmp_path):
    address = f"localhost:{free_port()}"
    options = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", address)
    args = ("train", "digits", "--strategy", "ddp", "--epochs", 2, "--density", 0.1, "--quiet", "--out", tmp_path / "r")
    jobs = [torchrun(tmp_path, *args, size=1, options=options) for _ in range(2)]
    said = [outcome(job) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert sorted(text.count("asked 10.00 %") for text in said) == [0, 1]
    end = fit(Recipe(epochs=2, density=0.1).check(), tmp_path / "one", quiet=True)
    assert rows_of(tmp_path / "r")[-1]["test_loss"] == pytest.approx(end["test_loss"], rel=1e-4)
