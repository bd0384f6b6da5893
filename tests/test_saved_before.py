"""What version 0.1.0 saved still loads and goes on: state_dicts, sparse files, run folders (tests/data/v0.1.0)."""

import json
import shutil
from pathlib import Path

import pytest
import saved
import torch
from safetensors.torch import load_file

import torch_bregman as tb
from torch_bregman.train import Recipe, fit

DATA = Path(__file__).parent / "data" / "v0.1.0"
# The machine that made the files may have added up in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module")
def states():
    return torch.load(DATA / "states.pt", weights_only=True)


@pytest.mark.parametrize("name", saved.CASES)
def test_a_state_dict_goes_on(states, name):
    state = states[name]
    model, optimizer, also = saved.make(name)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for one, its in zip(also, state["also"], strict=True):
        one.load_state_dict(its)
    for p, loaded in zip(model.state_dict().values(), state["model"].values(), strict=True):
        assert p.equal(loaded)
    saved.train(model, optimizer, also, saved.MORE)
    if name.startswith("levels"):
        also[-1].leave()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state["after"][key], **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
        assert (value != 0).equal(state["after"][key] != 0), key


def test_the_phases_were_saved_half_way(states):
    """So that what is loaded is a coarse phase, and a controller that has work to do."""
    assert states["levels"]["also"][1]["restricted"]
    assert states["levels-rows"]["also"][0]["restricted"]
    assert states["control"]["also"][0]["steps"] == saved.STEPS


@pytest.mark.parametrize("name", saved.FILES)
def test_a_sparse_file_is_the_network(name):
    _, x, _ = saved.prepared(name)
    model = saved.FILES[name]()
    if name == "heads-shrunk":  # its sizes stand in the code: a file of it fits what shrink makes
        model = tb.shrink(saved.prepared(name)[0], (x,)).model
    model = tb.load_sparse(model, DATA / f"{name}.safetensors").eval()
    with torch.no_grad():
        y = model(x)
    close = {"rtol": 1e-2, "atol": 1e-2} if "bfloat16" in name else CLOSE
    torch.testing.assert_close(y, load_file(DATA / "outputs.safetensors")[name], **close)


@pytest.mark.parametrize("name", [name for name in saved.FILES if name != "heads-shrunk"])
def test_a_file_written_now_says_the_same(name, tmp_path):
    model, x, shrunk = saved.prepared(name)
    small = tb.shrink(model, (x,)).model if shrunk else model
    tb.save_sparse(small, tmp_path / "now", dtype=torch.bfloat16 if "bfloat16" in name else None)
    was, told = tb.read_sparse(DATA / f"{name}.safetensors")
    now, tells = tb.read_sparse(tmp_path / "now")
    if name == "attention-shrunk":  # a weight that is also an embedding counts no more
        assert told["kept"] - tells["kept"] == told["size"] - tells["size"] == 7 * 8
        told = {**told, "kept": tells["kept"], "size": tells["size"]}
    assert tells == told
    assert was.keys() == now.keys()
    for key, value in was.items():
        torch.testing.assert_close(now[key], value, **CLOSE)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy of a run folder, beside the module with its network."""
    (tmp_path / "smallnet.py").write_text(saved.SMALLNET)
    monkeypatch.syspath_prepend(tmp_path)

    def copied(name):
        shutil.copytree(DATA / name, tmp_path / "run")
        return tmp_path / "run"

    return copied


@pytest.mark.parametrize("name", [name for name in saved.RUNS if name != "ended"])
def test_a_stopped_run_goes_on(run, name):
    folder = run(name)
    recipe = Recipe.read(folder / "recipe.toml")
    fit(recipe, folder, quiet=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum("epoch" in row for row in rows) >= 4
    expected = load_file(folder / "expected.safetensors")
    for key, value in load_file(folder / "last.safetensors").items():
        torch.testing.assert_close(value, expected[key], **CLOSE)
    assert rows[-1]["density"] == pytest.approx(recipe.density, abs=0.001)


def test_an_ended_run_is_read(run, command):
    folder = run("ended")
    for told in (["report", "run"], ["shrink", "run"], ["export", "run"]):
        done = command(*told)
        assert done.returncode == 0, done.stderr
    assert {"report.html", "recipe.toml", "last.safetensors"} <= {path.name for path in folder.iterdir()}
    assert len(list(folder.rglob("*.safetensors"))) > len(list((DATA / "ended").rglob("*.safetensors")))
