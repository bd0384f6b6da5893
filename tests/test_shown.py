"""Reports in a loop of one's own: a text, a table of a notebook, and plain values for a logger."""

import json
import re

import pytest
import torch
from torch import nn

import torch_bregman as tb
from torch_bregman.proof.figures import Fact, Latency
from torch_bregman.proof.sheet import Proof
from torch_bregman.text import Shown, Table


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One of each report."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    tb.sparse_init_(model, 0.5)
    optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1(), lam=0.1), lr=1e-2)
    x = torch.randn(4, 6)
    levels = tb.Multilevel(model, optimizer, coarse_steps=1, fine_steps=1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        levels.step()
    fact, latency = Fact("parameters", 83.0, 40.0, "", "all"), Latency("dense, PyTorch", 1, 1, 1e-3, 2e-3, 1.5)
    return {
        "density": tb.sparsity_report(model, rank=True),
        "shrink": tb.shrink(model, (x,)).report,
        "inference": tb.optimize_for_inference(model, (x,)).report,
        "levels": levels.report,
        "file": tb.save_sparse(model, tmp_path_factory.mktemp("saved") / "<b>.safetensors"),
        "proof": Proof("test accuracy", {"dense": 0.9}, 0.5, 0.0, (fact,), (latency,), (), "a machine"),
    }


@pytest.mark.parametrize("name", ["density", "shrink", "inference", "levels", "file", "proof"])
def test_a_report_is_its_text_a_table_and_plain_values(made, name):
    report = made[name]
    assert isinstance(report, Shown)
    assert repr(report) == str(report)
    page = report._repr_html_()
    assert "<b>" not in page
    for part in report.shown():
        cells = [cell for row in part.rows for cell in row] if isinstance(part, Table) else [part]
        assert all(cell.replace("<", "&lt;").replace(">", "&gt;") in page for cell in cells)
    values = report.to_dict()
    assert values
    assert json.loads(json.dumps(values)) == values
    assert {type(value) for value in values.values()} <= {int, float, str}


def test_the_values_are_those_of_the_layers(made):
    report = made["density"]
    values = report.to_dict()
    assert (values["density"], values["density/0.weight"]) == (report.density, report.layers[0].density)
    assert (values["kept"], values["size"], values["counted"]) == (*report.weights, 1.0)
    assert values["rank/2.weight"] <= 3
    assert made["shrink"].to_dict()["parameters"] == made["shrink"].parameters[1]
    assert made["shrink"].to_dict()["outputs/2"] == 3
    assert made["inference"].to_dict()["chosen/0"] in ("dense", "sparse")
    assert made["file"].to_dict()["bytes"] == made["file"].bytes
    assert made["proof"].to_dict()["parameters/sparse"] == 40
    assert made["proof"].to_dict()["ms at batch 1/dense, PyTorch"] == 1


def test_a_table_of_a_page_says_what_the_text_says():
    rows = Table([("layer", "n"), ("a & b", "1"), ("<i>", "22")])
    assert str(rows).splitlines() == ["layer   n", "a & b   1", "<i>    22"]
    page = rows.html()
    assert re.findall(r"<td[^>]*>([^<]*)</td>", page) == ["a &amp; b", "1", "&lt;i&gt;", "22"]
    assert page.count("<th ") == 2
