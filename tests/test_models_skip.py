"""Networks whose skips are found by training: the equation, the start, what is regularised and what is recorded."""

import json

import pytest
import torch

from torch_bregman import L1, AdaBreg, TargetDensity, sparse_init_, sparsity_report
from torch_bregman.models import Autoencoder, build
from torch_bregman.models.skip import SkipChain, skips
from torch_bregman.train import fit
from torch_bregman.train.recipe import Recipe, make_control, make_optimizer

SHAPES = {"skipencoder": (1, 8, 8), "densenet": (1, 8, 8)}


def chain_of(widths: int = 5, length: int = 4) -> SkipChain:
    torch.manual_seed(0)
    return SkipChain(torch.nn.Sequential(torch.nn.Linear(widths, widths), torch.nn.ReLU()) for _ in range(length))


def test_the_chain_is_its_equation():
    chain = chain_of().double()
    s = torch.randn(4, 4, dtype=torch.double)
    with torch.no_grad():
        chain.skips.copy_(s)
    x = [torch.randn(3, 5, dtype=torch.double)]
    for i in range(1, 5):
        linear = chain.layers[i - 1][0]
        out = (x[i - 1] @ linear.weight.T + linear.bias).clamp_min(0)
        for j in range(i):
            out = out + s[i - 1, j] * x[j]
        x.append(out)
    torch.testing.assert_close(chain(x[0]), x[4])


def test_skips_above_the_diagonal_are_not_used():
    chain = chain_of()
    chain(torch.randn(3, 5)).square().sum().backward()
    used = torch.ones(4, 4).tril().bool()
    assert (chain.skips.grad[used] != 0).all()
    assert (chain.skips.grad[~used] == 0).all()


def test_at_the_start_it_is_the_plain_network():
    torch.manual_seed(0)
    encoder, plain = build("skipencoder", (1, 8, 8), 10), Autoencoder((1, 8, 8))
    # The plain network has no skips, and else the same weights in the same order.
    weights = [p for name, p in encoder.named_parameters() if not name.endswith("skips")]
    with torch.no_grad():
        for mine, other in zip(plain.parameters(), weights, strict=True):
            mine.copy_(other)
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(encoder(x), plain(x), rtol=0, atol=0)
    assert encoder.task == plain.task
    dense = build("densenet", (1, 8, 8), 10)
    assert all(s == 0 for found in (skips(encoder), skips(dense)) for c in found for line in c["skips"] for s in line)
    assert dense(x).shape == (3, 10)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("optimizer", ["adabreg", "linbreg", "proxsgd"])
def test_skips_are_under_l1_and_no_density_counts_them(name, optimizer):
    model = build(name, SHAPES[name], 10)
    recipe = Recipe(model=name, optimizer=optimizer, regularizer="group-l1", lam=0.07).check()
    made = make_optimizer(recipe, model)
    of = {id(p): i for i, group in enumerate(made.param_groups) for p in group["params"]}
    for key, parameter in model.named_parameters():
        group, regularizer = made.param_groups[of[id(parameter)]], made.regularizers[of[id(parameter)]]
        if key.endswith("skips"):
            assert (regularizer, group["lam"], group["counted"]) == (L1(), 1.96, False)
        elif key.endswith("bias"):
            assert regularizer is None
        else:
            assert type(regularizer).__name__ == "GroupL1"
            assert (group["lam"], group["counted"]) == (0.07, True)
    assert sparsity_report(model).weights[1] == sum(
        p.numel() for key, p in model.named_parameters() if key.endswith("weight")
    )


def test_a_target_moves_the_lambda_of_the_weights_alone():
    model = sparse_init_(build("skipencoder", (1, 8, 8), 10), 0.1, "rows")
    recipe = Recipe(model="skipencoder", regularizer="group-l1", density=0.3, lr=1e-2).check()
    optimizer = make_optimizer(recipe, model)
    control = make_control(recipe, optimizer, model, 5)
    assert isinstance(optimizer, AdaBreg)
    assert isinstance(control, TargetDensity)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(16, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        control.step()
    lams = {str(reg): group["lam"] for group, reg in zip(optimizer.param_groups, optimizer.regularizers, strict=True)}
    assert lams["L1()"] == 1.96
    assert 0 < lams["GroupL1(groups='rows', weighted=True)"] != 0.07
    assert sparsity_report(model).density == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("name", SHAPES)
def test_a_run_records_widths_and_skips(name, tmp_path):
    recipe = Recipe(dataset="digits", model=name, regularizer="group-l1", density=0.3, epochs=1, limit=200).check()
    end = fit(recipe, tmp_path, quiet=True)
    model = build(name, SHAPES[name], 10)
    assert end["full_widths"] == [layer.outputs[1] for layer in sparsity_report(model).layers]
    assert all(0 <= alive <= full for alive, full in zip(end["widths"], end["full_widths"], strict=True))
    assert sum(end["widths"]) < sum(end["full_widths"])
    assert [(c["before"], len(c["skips"])) for c in end["skips"]] == (
        [(0, 6)] if name == "skipencoder" else [(1, 4), (6, 4)]
    )
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]) == end


def test_skips_come_alive_past_their_threshold():
    """With a gradient of one sign AdaBreg moves v by lr in every step: alive once lr · steps > λ."""
    torch.manual_seed(0)
    model = sparse_init_(build("skipencoder", (1, 4, 4), 10), 0.25, "rows")
    optimizer = make_optimizer(Recipe(model="skipencoder", regularizer="group-l1", lam=0.0, lr=0.1).check(), model)
    x = torch.randn(64, 1, 4, 4)
    alive = []
    for _ in range(40):
        optimizer.zero_grad()
        (model(x) - 5 * x).square().mean().backward()
        optimizer.step()
        alive.append(skips(model)[0]["skips"][5][0] != 0)
    assert not any(alive[:19])  # 19 · 0.1 < 1.96
    assert alive[-1]
