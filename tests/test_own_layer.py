"""A kind of layer of one's own: registered in a few lines here, and everything in the library works with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_bregman as tb
from torch_bregman.layers import forward_flops
from torch_bregman.multilevel.compact import CompactNetwork
from torch_bregman.multilevel.live import Live
from torch_bregman.network import Exchange, Kept, Kind, WeightedSum, register
from torch_bregman.network.graph import Graph
from torch_bregman.network.kinds import REGISTRY, of
from torch_bregman.part import Part


class MaskedLinear(nn.Module):
    """y = (W ⊙ M) x + b with a fixed mask M; not a subclass of nn.Linear."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_buffer("mask", torch.ones(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MaskedLinearKind(WeightedSum):
    arguments = ("in_features", "out_features")
    options = {"bias": True}  # noqa: RUF012

    def effective(self, module: Any) -> Tensor:
        return module.weight.detach() * module.mask

    def cut(self, module: Any, kept: Kept, exchange: Exchange) -> None:
        super().cut(module, kept, exchange)
        exchange("mask", kept.outputs, kept.inputs)


class Turned(nn.Module):
    """y = x W + b with W [inputs, outputs], as the Conv1D of a language model."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class TurnedKind(WeightedSum):
    rows_are_outputs = False
    counts = ("nf", "nx")
    arguments = ("nf", "nx")


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register(MaskedLinearKind(MaskedLinear))
    register(TurnedKind(Turned))
    yield
    for cls in (MaskedLinear, Turned):
        del REGISTRY[cls]


def masked() -> nn.Sequential:
    model = nn.Sequential(MaskedLinear(12, 40), nn.ReLU(), MaskedLinear(40, 30), nn.Tanh(), nn.Linear(30, 3))
    model[2].mask[:, ::4] = 0
    return model


def turned() -> nn.Sequential:
    return nn.Sequential(Turned(40, 12), nn.ReLU(), Turned(30, 40), nn.LayerNorm(30), nn.Linear(30, 3))


#: network, what is regularised together so that outputs die, and the names of its own layers' weights
NETWORKS = {
    "masked": (masked, "rows", ["0.weight", "2.weight"]),
    "turned": (turned, "columns", ["0.weight", "2.weight"]),
}
X, Y = torch.randn(64, 12, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3


def trained(name: str) -> tuple[nn.Sequential, tb.AdaBreg]:
    """From a sparse start to half of the weights, in groups that are outputs."""
    torch.manual_seed(0)
    build, groups, own = NETWORKS[name]
    model = build()
    tb.sparse_init_(model, 0.5, generator=torch.Generator().manual_seed(1))
    assert tb.density(model) == pytest.approx(0.5, abs=0.01)
    regularizer = {key: tb.GroupL1(groups) for key in own}
    optimizer = tb.AdaBreg(tb.param_groups(model, {**regularizer, "*": tb.L1()}, lam=0.01), lr=5e-3)
    assert {id(p) for g in optimizer.param_groups if g["counted"] for p in g["params"]} == {
        id(model[i].weight) for i in (0, 2, 4)
    }
    control = tb.TargetDensity(optimizer, 0.4, "exact", total_steps=60, model=model)
    for _ in range(60):
        train(model, optimizer)
        control.step()
    assert tb.density(model) == pytest.approx(0.4, abs=0.03)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(X), Y)
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def differ(a: nn.Module, b: nn.Module) -> float:
    pair = [copy.deepcopy(model).double().eval() for model in (a, b)]
    y, z = (model(X.double()) for model in pair)
    return float((y - z).abs().max() / y.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_from_the_start_to_the_proof(name: str, tmp_path: Path) -> None:
    model, optimizer = trained(name)
    report = tb.sparsity_report(model)
    assert [layer.name for layer in report.layers] == ["0.weight", "2.weight", "4.weight"]
    first = report.layers[0]
    assert (first.outputs[1], first.inputs[1]) == (40, 12)
    assert first.weights == (int(model[0].weight.count_nonzero()), 480)
    live = int((of(model[0]).matrix(model[0]) != 0).any(1).sum())
    assert first.outputs[0] == live < 40

    small = tb.shrink(model, (X[:4],))
    row = small.report.rows[0]
    assert (row.kind, row.before) == (type(model[0]).__name__, (40, 12))
    assert row.after[0] <= live
    assert small.model[2].weight.numel() < model[2].weight.numel()
    assert of(small.model[2]).sizes(small.model[2])[1] == row.after[0]
    assert type(small.model[0]) is type(model[0])
    assert differ(model, small.model) < 1e-6

    followed = tb.shrink(model, (X[:4],), optimizer)
    losses = train(model, optimizer), train(followed.model, followed.optimizer)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert train(followed.model, followed.optimizer) < losses[0]

    saved = tb.save_sparse(small.model, tmp_path / "small.safetensors")
    assert saved.size == sum(small.model[i].weight.numel() for i in (0, 2, 4))
    loaded = tb.load_sparse(NETWORKS[name][0](), tmp_path / "small.safetensors")
    assert [module.weight.shape for module in (loaded[0], loaded[2])] == [
        module.weight.shape for module in (small.model[0], small.model[2])
    ]
    assert torch.equal(loaded(X), small.model(X))

    proof = tb.prove(None, small.model, X[:2], rounds=1, batches=(1,), rivals=False)
    flops = next(fact for fact in proof.facts if fact.name == "FLOPs per sample")
    live_weights = [int(of(small.model[i]).matrix(small.model[i]).count_nonzero()) for i in (0, 2, 4)]
    assert flops.sparse == 2 * sum(live_weights)
    assert forward_flops(loaded, (X[:1],)) == {str(i): 2 * loaded[i].weight.numel() for i in (0, 2, 4)}


@pytest.mark.parametrize("name", NETWORKS)
def test_multilevel_trains_it_as_ever(name: str) -> None:
    build = NETWORKS[name][0]
    torch.manual_seed(0)
    model = tb.sparse_init_(build(), 0.2, generator=torch.Generator().manual_seed(1))
    optimizer = tb.LinBreg(tb.param_groups(model, tb.L1(), lam=0.1), lr=0.1)
    levels = tb.Multilevel(model, optimizer, coarse_steps=3)
    losses = []
    for _ in range(40):
        losses.append(train(model, optimizer))
        levels.step()
    levels.leave()
    assert levels.counts["coarse"] > 20
    assert losses[-1] < losses[0]
    assert 0 < tb.density(model) < 0.9


class Einsum(nn.Module):
    """y = W x + b, written in another way."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,oi->bo", x, self.weight) + self.bias


class EinsumKind(WeightedSum):
    in_training = True

    def dense(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.einsum("bi,oi->bo", x, weight) + bias


def test_multilevel_leaves_its_dead_units_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, Einsum, EinsumKind(Einsum))
    torch.manual_seed(0)
    model = nn.Sequential(Einsum(12, 40), nn.ReLU(), Einsum(40, 30), nn.Tanh(), nn.Linear(30, 3))
    alive = {"0": torch.arange(40) % 4 == 0, "2": torch.arange(30) % 3 == 0}
    for name, mask in alive.items():
        model.get_submodule(name).weight.data[~mask] = 0
    graph = Graph(model, (X,))
    lives = [Live(layer.weight, Part(layer.weight, (1,))) for layer in (model[0], model[2])]
    small = CompactNetwork(graph, graph.cut(alive), lives).model
    assert [small[i].weight.shape for i in (0, 2)] == [(10, 12), (10, 40)]  # rows that live, on all inputs
    y, z = (network(X) for network in (model, small))
    torch.testing.assert_close(y, z)
    wanted = torch.autograd.grad(F.cross_entropy(y, Y), [model[0].weight, model[2].weight])
    got = torch.autograd.grad(F.cross_entropy(z, Y), [small[0].weight, small[2].weight])
    for full, live, mask in zip(wanted, got, alive.values(), strict=True):
        torch.testing.assert_close(full[mask], live)


def test_min_inputs_and_fan_in_know_how_the_weight_lies() -> None:
    layer = Turned(50, 8)
    tb.sparse_init_(layer, 0.02, generator=torch.Generator().manual_seed(0), min_inputs=2)
    assert ((layer.weight != 0).sum(0) >= 2).all()  # outputs are columns
    tb.sparse_init_(layer, 1.0, generator=torch.Generator().manual_seed(0))
    assert layer.weight.std().item() == pytest.approx((2 / 8) ** 0.5, rel=0.1)


def test_of_a_subclass_only_what_it_has_is_known() -> None:
    class Twice(MaskedLinear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Twice(6, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].weight.data[:5] = 0
    assert tb.density(model) == pytest.approx((18 + int(model[2].weight.count_nonzero())) / 64)
    small = tb.shrink(model, (torch.randn(3, 6),))
    assert small.model[0].out_features == 8


def test_without_a_kind_nothing_is_known_and_nothing_breaks() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    model = nn.Sequential(Strange(), nn.ReLU(), nn.Linear(5, 2))
    assert tb.density(model) == 1
    assert tb.shrink(model, (torch.randn(3, 4),)).model[0].weight.shape == (5, 4)


def test_what_cannot_be_registered() -> None:
    with pytest.raises(TypeError, match="Invalid `kind`: <class"):
        register(MaskedLinearKind)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a class of modules"):
        register(Kind(int))  # type: ignore[arg-type]
    impostor = type("Linear", (nn.Module,), {})
    with pytest.raises(ValueError, match="Linear of torch"):
        register(Kind(impostor))
    assert of(nn.Linear(1, 1)).module_class is nn.Linear
