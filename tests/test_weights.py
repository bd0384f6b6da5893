"""What counts as a weight: known to its layer, looking like experts, or named; the same for all functions."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torch_bregman as tb
from torch_bregman.layers import weight_layers


class Product(nn.Module):
    """y = x W: a Linear of one's own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Experts(nn.Module):
    """A stack of matrices, each for its share of the rows of x."""

    def __init__(self, experts: int = 3, width: int = 8, hidden: int = 20) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, width, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.view(len(self.up), -1, x.shape[1])
        return (torch.bmm(parts, self.up).relu() @ self.down).flatten(0, 1)


def own() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Product(30, 40), nn.ReLU(), nn.Linear(40, 10))


def alive(*tensors: Tensor) -> float:
    """The share of non-zero entries, counted here by hand."""
    return sum((t != 0).sum().item() for t in tensors) / sum(t.numel() for t in tensors)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, control: tb.TargetDensity, x: Tensor) -> list[float]:
    losses, goal = [], torch.randn(len(x), 10 if isinstance(model, nn.Sequential) else x.shape[1])
    for _ in range(control.total_steps or 0):
        optimizer.zero_grad()
        loss = (model(x) - goal).square().mean()
        loss.backward()
        optimizer.step()
        control.step()
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------------- named


@pytest.mark.parametrize("key", [Product, "0", "0.weight"])
@pytest.mark.parametrize("how", ["weights", "regularizer"])
def test_what_is_named_is_started_penalised_counted_and_controlled(key, how):
    model = own()
    if how == "weights":
        tb.sparse_init_(model, 0.1, weights={key: "io"})
        groups = tb.param_groups(model, tb.L1())
    else:
        groups = tb.param_groups(model, {key: tb.L1(), nn.Linear: tb.L1()})
        tb.sparse_init_(model, 0.1)
    assert alive(model[0].weight) == 0.1
    assert alive(model[2].weight) == 0.1
    optimizer = tb.AdaBreg(groups, lr=1e-2)
    control = tb.TargetDensity(optimizer, 0.2, total_steps=60)
    losses = train(model, optimizer, control, torch.randn(64, 30))
    assert losses[-1] < losses[0]
    by_hand = alive(model[0].weight, model[2].weight)
    assert by_hand == pytest.approx(0.2, abs=1e-6)
    assert tb.density(model) == control.density == by_hand
    assert tb.sparsity_report(model).counted == (1600, 1600)
    assert tb.density(copy.deepcopy(model)) == by_hand


@pytest.mark.parametrize(("layout", "outputs", "inputs"), [("io", 40, 30), ("oi", 30, 40)])
def test_a_layout_says_what_are_outputs(layout, outputs, inputs):
    model = own()
    report = tb.sparsity_report(model, weights={Product: layout})
    assert report.layers[0].outputs == (outputs, outputs)
    assert report.layers[0].inputs == (inputs, inputs)
    layer = next(weight_layers(model))
    assert layer.fan_in == inputs
    torch.manual_seed(3)
    tb.sparse_init_(model, 0.5)
    assert model[0].weight.var().item() == pytest.approx(2 / inputs, rel=0.2)


def test_min_inputs_connects_the_outputs_of_a_named_weight():
    model = own()
    tb.sparse_init_(model, 0.01, weights={Product: "io"}, min_inputs=1)
    assert (model[0].weight != 0).any(0).all()


def test_names_as_a_list():
    model = own()
    assert tb.density(model, weights=[Product]) == 1.0
    assert tb.sparsity_report(model).counted == (1600, 1600)


def test_what_is_named_as_none_is_no_weight():
    model = own()
    tb.sparse_init_(model, 0.1, weights={"2": None, Product: "io"})
    assert alive(model[2].weight) == 1.0
    assert [layer.name for layer in tb.sparsity_report(model).layers] == ["0.weight"]
    groups = tb.param_groups(model, tb.L1())
    assert [sum(p.numel() for p in g["params"]) for g in groups if g["regularizer"] is not None] == [1200]


def test_a_recurrent_network_named_by_its_class():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x[:, None])[0][:, 0])

    torch.manual_seed(0)
    model = Net()
    tb.sparse_init_(model, 0.1, weights=[nn.LSTM])
    optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1()), lr=1e-2)
    control = tb.TargetDensity(optimizer, 0.2, total_steps=40)
    train(model, optimizer, control, torch.randn(32, 8))
    by_hand = alive(model.lstm.weight_ih_l0, model.lstm.weight_hh_l0, model.head.weight)
    assert tb.density(model) == control.density == by_hand == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"1.weihgt": "io"}, "matches no parameter"),
        ([nn.Conv2d], "Conv2d matches no layer"),
        ({Product: "xy"}, "'xy'.*expected a letter per dimension"),
        ({Product: "oo"}, "'oo'"),
        ({Product: 3}, "3"),
        ({Product: "eio"}, r"'eio'.*\(30, 40\)"),
        ([3], "Invalid key 3"),
        ("0.weight", "expected a list or a mapping"),
        (["0*"], "reaches no weight; to reach 0.weight, give its whole name"),
    ],
)
def test_mistakes_in_names(weights, words):
    for function in (tb.sparse_init_, tb.param_groups, tb.density, tb.sparsity_report):
        with pytest.raises(ValueError, match=words):
            function(own(), weights=weights)
    with pytest.raises(ValueError, match=words):
        tb.prune_(own(), 0.5, weights=weights)


@pytest.mark.parametrize("key", [nn.Conv2d, nn.LayerNorm, "norm*"])
def test_a_key_that_reaches_nothing_is_an_error(key):
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(4, 4))
    model.add_module("norm", nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"matches no layer|reaches no weight"):
        tb.param_groups(model, {key: tb.L1(), "*": tb.L1()})


# ---------------------------------------------------------------------- known by themselves


@pytest.mark.parametrize("named", [None, {Experts: "eio"}])
def test_experts(named):
    torch.manual_seed(0)
    model = Experts()
    tb.sparse_init_(model, 0.25, weights=named)
    assert alive(model.up) == 0.25
    layers = {layer.name: layer for layer in weight_layers(model)}
    assert {name: layer.fan_in for name, layer in layers.items()} == {"up": 8, "down": 20}
    assert [layer.outputs[1] for layer in tb.sparsity_report(model).layers] == [60, 24]
    optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1()), lr=1e-2)
    control = tb.TargetDensity(optimizer, 0.3, total_steps=40)
    train(model, optimizer, control, torch.randn(30, 8))
    assert tb.density(model) == control.density == alive(model.up, model.down) == pytest.approx(0.3, abs=1e-3)


def test_the_module_says_how_its_experts_lie():
    model = Experts(width=8, hidden=20)
    model.is_transposed = False
    assert {layer.name: layer.fan_in for layer in weight_layers(model)} == {"up": 20, "down": 8}
    model = Experts(width=20, hidden=8)  # narrower inside
    model.hidden_size = 20
    assert {layer.name: layer.fan_in for layer in weight_layers(model)} == {"up": 20, "down": 8}


def test_stacks_that_are_no_experts_stay():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.randn(1, 16, 8))
            self.table = nn.Parameter(torch.randn(2, 16, 8))

    assert not list(weight_layers(Tokens()))


@pytest.mark.parametrize("groups", ["filters", "kernels", "channels"])
def test_named_groups_are_none_of_experts(groups):
    with pytest.raises(ValueError, match="stack of matrices"):
        tb.param_groups(Experts(), tb.GroupL1(groups))
    with pytest.raises(ValueError, match="fits none of the weights"):
        tb.sparse_init_(Experts(), 0.5, groups=groups)


@pytest.mark.parametrize("apart", [False, True])
def test_projections_of_attention_are_weights(apart):
    torch.manual_seed(0)
    sizes = {"kdim": 12, "vdim": 10} if apart else {}
    model = nn.MultiheadAttention(16, 4, batch_first=True, **sizes)
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if apart else ["in_proj_weight"]
    assert [layer.name for layer in weight_layers(model)] == [*names, "out_proj.weight"]
    tb.sparse_init_(model, 0.25)
    for layer in weight_layers(model):
        assert alive(layer.weight) == pytest.approx(0.25, abs=0.01)
        assert layer.weight.detach()[layer.weight != 0].var().item() * 0.25 * layer.fan_in == pytest.approx(2, rel=0.5)


# ---------------------------------------------------------------------- what is passed over is said


def test_what_is_not_counted_is_said_with_its_share():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(16, 8))
    with pytest.warns(UserWarning, match=re.escape("128 of 528 matrix entries are weights; 76%")) as caught:
        tb.param_groups(model, tb.L1())
    assert len(caught) == 1
    assert "0.weight (an embedding; 400)" in str(caught[0].message)
    assert caught[0].filename == __file__
    text = str(tb.sparsity_report(model))
    assert "128 of 528 matrix entries are counted, without 0.weight (an embedding; 400)" in text


@pytest.mark.parametrize("how", ["weights", "regularizer"])
def test_what_is_left_dense_on_purpose_is_not_warned_about(how):
    model = nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(16, 8))
    if how == "weights":
        tb.param_groups(model, tb.L1(), weights={nn.Embedding: None})
    else:
        tb.param_groups(model, {nn.Embedding: None, "*": tb.L1()})


@pytest.mark.parametrize("make", [parametrizations.weight_norm, parametrizations.orthogonal, "prune"])
def test_reparametrised_layers_are_named_with_the_remedy(make):
    layer = nn.Linear(6, 6)
    model = nn.Sequential(
        prune.random_unstructured(layer, "weight", 0.5) if make == "prune" else make(layer), nn.Linear(6, 6)
    )
    for function in (tb.sparse_init_, tb.param_groups, tb.density, tb.sparsity_report):
        with pytest.warns(
            UserWarning, match=r"0\.weight is computed from other tensors.*(remove_para|prune\.rem)"
        ) as w:
            function(model)
        assert len(w) == 1
        assert w[0].filename == __file__


# ---------------------------------------------------------------------- prune_


@pytest.mark.parametrize("density", [0.01, 0.05, 0.5, 1.0])
def test_prune_keeps_the_largest_weights_exactly(density):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(24, 30), nn.BatchNorm1d(30), nn.Linear(30, 4))
    before = copy.deepcopy(model)
    assert tb.prune_(model, density) is model
    flat = torch.cat([layer.weight.flatten() for layer in weight_layers(before)])
    least = flat.abs().sort(descending=True).values[round(density * len(flat)) - 1]
    assert tb.density(model) * len(flat) == pytest.approx(round(density * len(flat)))
    for (name, was), now in zip(before.named_parameters(), model.parameters(), strict=True):
        kept = (was.abs() >= least) | torch.tensor(was.dim() < 2)
        torch.testing.assert_close(now, torch.where(kept, was, 0.0), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("groups", ["rows", "columns"])
def test_prune_by_groups(groups):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10))
    tb.prune_(model, 0.4, groups)
    dim = 1 if groups == "rows" else 0
    for layer in model:
        whole = (layer.weight != 0).any(dim)
        assert torch.equal((layer.weight != 0).all(dim), whole)
    assert tb.density(model) == pytest.approx(0.4, abs=30 / 900)


def test_prune_breaks_ties_and_says_where_there_is_nothing_to_prune():
    model = nn.Linear(10, 10)
    nn.init.ones_(model.weight)
    assert tb.density(tb.prune_(model, 0.37)) == 0.37
    with pytest.warns(UserWarning, match=re.escape("only 37 of 100 weights are alive (37.00%)")):
        tb.prune_(model, 0.5)
    with pytest.raises(ValueError, match="no Linear or Conv"):
        tb.prune_(nn.ReLU(), 0.5)
    with pytest.raises(ValueError, match="for 5 % write"):
        tb.prune_(model, 5)


def test_an_average_is_pruned_to_what_was_asked():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 10))
    tb.sparse_init_(model, 0.05)
    optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1()), lr=1e-2)
    control = tb.TargetDensity(optimizer, 0.05, total_steps=60)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    x, goal = torch.randn(64, 30), torch.randn(64, 10)
    for _ in range(60):
        optimizer.zero_grad()
        (model(x) - goal).square().mean().backward()
        optimizer.step()
        control.step()
        average.update_parameters(model)
    assert tb.density(model) == 0.05
    assert tb.density(average) > 0.06
    assert tb.density(tb.prune_(average, 0.05)) == 0.05
