"""README, CONTRIBUTING and docs: their Python runs, their links lead somewhere, and the README stays a door."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_bregman as tb
from torch_bregman.network.kinds import REGISTRY

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Pages whose code needs several processes; what it says is tested in tests/test_fsdp.py and test_multilevel_ddp.py.
RANKS = {("dtensors.md", 0), ("multilevel.md", 1)}


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))


class MaskedLinear(nn.Module):
    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_buffer("mask", torch.ones(out_features, in_features))

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class Conv1D(nn.Module):
    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the reader of a page has: a network, data, and an optimizer. Kinds of layers of a page end with it."""
    monkeypatch.chdir(tmp_path)
    kinds = dict(REGISTRY)
    torch.manual_seed(0)
    model, x, y = tb.sparse_init_(Net(), 0.3), torch.randn(32, 12), torch.randint(0, 3, (32,))
    optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1()), lr=1e-2)
    control = tb.TargetDensity(optimizer, 0.2)
    F.cross_entropy(model(x), y).backward()
    yield {
        "tb": tb, "torch": torch, "nn": nn, "F": F, "Net": Net, "model": model, "loader": [(x, y)] * 20, "epochs": 1,
        "loss": F.cross_entropy, "x": x, "optimizer": optimizer, "control": control, "MaskedLinear": MaskedLinear,
        "Conv1D": Conv1D,
    }  # fmt: skip
    REGISTRY.clear()
    REGISTRY.update(kinds)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_python_runs(page, names, recwarn):
    for i, block in enumerate(BLOCK.findall(page.read_text())):
        if (page.name, i) not in RANKS or page.parent == ROOT:
            exec(compile(block, f"{page.name}, block {i}", "exec"), names)
    if page == ROOT / "README.md":
        assert tb.density(names["model"]) == pytest.approx(0.05, abs=0.003)


def test_the_classes_of_contributing_train(names):
    for block in BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text()):
        exec(block, names)
    for make in (
        lambda model: tb.AdaBreg(tb.param_groups(model, names["ElasticNet"]()), lr=1e-2),
        lambda model: names["NormedBreg"](tb.param_groups(model), lr=0.1),
    ):
        model = tb.sparse_init_(Net(), 0.1)
        optimizer = make(model)
        control = tb.TargetDensity(optimizer, 0.25, total_steps=30)
        x, y = names["loader"][0]
        for _ in range(30):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            control.step()
        assert tb.density(model) == pytest.approx(0.25, abs=1 / 240)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_it_names_exist(page):
    for name in re.findall(r"`((?:src|tests|benchmarks|experiments|docs)/[\w./-]+\.\w+)`", page.read_text()):
        assert "NAME" in name or "/." in name or (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize("mark", ["J", "ML", "A", "LH"])
def test_marks_are_explained_where_they_stand(mark):
    for page in [*PAGES, *(ROOT / "src").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
        text = page.read_text()
        if re.search(rf"(?<![\w\]])\[{mark}[,\]]", text):
            assert re.search(rf"\[{mark}\] (is )?[A-Z]\w+, ", text), f"{page.name}: [{mark}]"


def test_the_readme_is_a_door():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    commands = [line for line in text.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert all("-c constraints.txt" in line for line in commands)
