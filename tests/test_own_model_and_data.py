"""A model and a data set of the user's own: one function each, and the command, its recipe and the report follow."""

import json

import numpy as np
import pytest

from torch_bregman.data import DataError, load

FILE = '''
import numpy as np
from torch import nn


def stripes():
    """Two classes of 6 x 6 images: bright rows, bright columns."""
    random = np.random.default_rng(0)
    y = np.arange(300) % 2
    x = random.random((300, 6, 6), dtype=np.float32)
    place = random.integers(0, 6, 300)
    x[np.arange(300)[y == 0], place[y == 0]] += 2
    x[np.arange(300)[y == 1], :, place[y == 1]] += 2
    return {"x": x, "y": y}


def net(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 30), nn.ReLU(), nn.Linear(30, classes))
'''


def test_one_function_each(command, tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    done = command("train", "mine:stripes", "--model", "mine:net", "--epochs", 30, "--density", "0.2", "--out", "run")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    end = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert end["density"] == pytest.approx(0.2, abs=0.002)
    assert end["test_accuracy"] > 0.9
    assert 'dataset = "mine:stripes"' in (run / "recipe.toml").read_text()
    assert "mine:stripes" in (run / "report.html").read_text()
    again = command("report", "run")
    assert again.returncode == 0, again.stderr


def test_a_name_of_its_own(command, tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    done = command("train", "mine:stripes", "--epochs", 1)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("stripes-mlp")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere:make", "Invalid `dataset`: 'nowhere:make'; expected package.module:function"),
        ("numpy:nothing", "Invalid `dataset`: 'numpy:nothing'; expected package.module:function"),
        ("builtins:list", "builtins:list: returned list; expected a dict of arrays"),
        ("builtins:dict", "builtins:dict: holds nothing; expected x_train and y_train, or x and y."),
    ],
)
def test_what_is_none(name, sentence):
    with pytest.raises(DataError) as raised:
        load(name)
    assert str(raised.value).startswith(sentence)


def test_the_rules_are_those_of_a_file(tmp_path, monkeypatch):
    (tmp_path / "minefile.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    import minefile

    np.savez(tmp_path / "stripes.npz", **minefile.stripes())
    mine, file = load("minefile:stripes"), load(tmp_path / "stripes.npz")
    assert mine.name == file.name == "stripes"
    assert mine.classes == file.classes
    assert mine.train.x.equal(file.train.x)
    assert mine.test.y.equal(file.test.y)
