"""Hooks on weights and modules under Multilevel, and what its report says of them and of what is missing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from cases import pairwise
from test_multilevel import OPTIMIZERS, _double, batch, mlp, train  # noqa: F401 - fixtures
from torch import Tensor, nn
from torch.nn.utils import prune

import torch_bregman as tb
from torch_bregman import kernels
from torch_bregman.multilevel import choice


def normed(dropout: float = 0.0) -> nn.Sequential:
    """Half of the rows are dead."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 15), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(15, 3),
    )  # fmt: skip
    tb.sparse_init_(model, 0.5)
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight[::2] = 0
        model[1].bias.fill_(0.1)  # what is constant is not where a ReLU bends
    return model


def half(weight: Tensor) -> Any:
    """A hook that lets the upper half of the rows rest."""
    mask = torch.ones_like(weight)
    mask[: len(weight) // 2] = 0
    return lambda grad: grad * mask


def quieter(weight: Tensor) -> None:
    """A hook that changes the gradient where it lies."""
    assert weight.grad is not None
    weight.grad[: len(weight) // 2].zero_()


def hook(weight: Tensor, kind: str) -> None:
    if kind == "gradient":
        weight.register_hook(half(weight))
    else:
        weight.register_post_accumulate_grad_hook(quieter)


def choose(monkeypatch: pytest.MonkeyPatch, *, fast: bool) -> None:
    """Whatever can be computed with live weights is, or nothing."""
    for name in ("FASTER", "ABLE"):
        monkeypatch.setattr(choice, name, float("inf") if fast else 0.0)


@pairwise(
    {"kind": ["gradient", "accumulated"], "since": [0, 4, 8], "which": ["0.weight", "3.weight", "1.weight", "3.bias"]}
)
def test_hooks_on_parameters_are_called_as_without_restricting(
    kind: str, since: int, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for fast in (False, True):
        choose(monkeypatch, fast=fast)
        model = normed()
        optimizer = OPTIMIZERS["linbreg"](tb.param_groups(model, tb.L1(), lam=0.05))
        levels = tb.Multilevel(model, optimizer, coarse_steps=5, fine_steps=1)
        train(model, optimizer, range(since), levels.step)
        parameter = model.get_parameter(which)
        hook(parameter, kind)
        calls: Counter[str] = Counter()
        parameter.register_hook(lambda grad, calls=calls: calls.update([str(tuple(grad.shape))]))
        before = parameter.detach().clone()
        train(model, optimizer, range(since, 14), levels.step)
        assert calls == {str(tuple(parameter.shape)): 14 - since}
        if since == 0:
            rested = slice(len(parameter) // 2)
            torch.testing.assert_close(parameter[rested], before[rested], rtol=1e-12, atol=1e-12)
        assert not torch.equal(parameter, before)
        results.append([p.detach().clone() for p in model.parameters()])
        told = f"{which} has a gradient hook" in str(levels.report)
        assert told == (which in ("0.weight", "3.weight"))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("which", ["0.weight", "3.weight", "1.weight", "3.bias"])
@pytest.mark.parametrize("since", [0, 3])
def test_a_compact_network_gives_way_to_a_hook(since: int, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, fast=True)
    results = []
    for hooks in (False, True):
        model = normed()
        optimizer = OPTIMIZERS["linbreg"](tb.param_groups(model, tb.GroupL1("rows"), lam=0.05))
        levels = tb.Multilevel(model, optimizer, coarse_steps=5, fine_steps=1)
        train(model, optimizer, range(since), levels.step)
        if since:
            assert levels._modules.network is not None
            assert levels._modules.network.compact is not None
        shapes: list[tuple[int, ...]] = []
        if hooks:
            model.get_parameter(which).register_hook(lambda grad, shapes=shapes: shapes.append(tuple(grad.shape)))
        train(model, optimizer, range(since, 6), levels.step)
        results.append([p.detach().clone() for p in model.parameters()])
        train(model, optimizer, range(6, 9), levels.step)
        assert shapes == [tuple(model.get_parameter(which).shape)] * (9 - since) * hooks
        assert (which in str(levels.report)) == (hooks and which.startswith("3"))  # layer 0 has no dead rows any more
    if since:  # the phase goes on as it was
        for p, q in zip(*results, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("regularizer", [tb.L1(), tb.GroupL1("rows")], ids=repr)
@pytest.mark.filterwarnings("ignore:Full backward hook")  # the first layer's
@pytest.mark.parametrize("where", ["layers", "root", "containers", "global"])
def test_timings_call_no_hook_and_leave_no_trace(
    where: str, regularizer: tb.Regularizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, fast=True)
    model = nn.Sequential(normed(0.2)) if where == "containers" else normed(0.2)
    optimizer = OPTIMIZERS["adabreg"](tb.param_groups(model, regularizer, lam=0.05))
    levels = tb.Multilevel(model, optimizer, coarse_steps=5, fine_steps=1)
    calls: Counter[str] = Counter()
    places = {"root": [model], "layers": [m for m in model if m is not model], "containers": [model[0]], "global": []}
    handles = [nn.modules.module.register_module_forward_hook(lambda *_: calls.update(["forward"]))]
    for place in places[where]:
        handles += [
            place.register_forward_pre_hook(lambda *_: calls.update(["before"])),
            place.register_forward_hook(lambda *_: calls.update(["after"])),
            place.register_full_backward_hook(lambda *_: calls.update(["back"])),
            place.register_full_backward_pre_hook(lambda *_: calls.update(["back before"])),
        ]
    try:
        for i in range(14):
            train(model, optimizer, range(i, i + 1))
            counted, state = Counter(calls), torch.get_rng_state()
            buffers = [b.clone() for b in model.buffers()]
            levels.step()
            assert calls == counted
            assert torch.equal(torch.get_rng_state(), state)
            assert all(map(torch.equal, buffers, model.buffers()))
    finally:
        for handle in handles:
            handle.remove()
    assert levels.timings.seconds or where == "containers"
    if where != "global":
        every = 14 * len(places[where])
        assert {calls[name] for name in ("before", "after", "back", "back before")} == {every}
    if where == "containers" and regularizer.outputs:
        assert "No smaller network: 0 has modules in it, and a hook." in str(levels.report)


def test_hooks_within_a_compact_network_see_whole_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that come when it is there."""
    choose(monkeypatch, fast=True)
    model = normed()
    optimizer = OPTIMIZERS["linbreg"](tb.param_groups(model, tb.GroupL1("rows"), lam=0.3))
    levels = tb.Multilevel(model, optimizer, coarse_steps=8, fine_steps=1)
    train(model, optimizer, range(6), levels.step)
    network = levels._modules.network
    assert network is not None
    assert network.compact is not None
    assert len(network.compact.model[3].weight) < 15
    shapes: list[tuple[int, ...]] = []
    model[3].register_forward_hook(lambda module, args, y: shapes.append(tuple(y.shape)))
    train(model, optimizer, range(6, 12), levels.step)
    assert shapes == [(9, 15)] * 6


class Boxed(nn.Module):
    """Calls a layer with what it does not understand without a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[4](self.layers[2]((self.layers[0](x),)))  # type: ignore[no-any-return]


def test_a_network_that_needs_its_hooks_is_not_timed_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, fast=True)
    model = Boxed()
    model.layers[2].register_forward_pre_hook(lambda module, args: args[0])
    optimizer = OPTIMIZERS["linbreg"](tb.param_groups(model, tb.L1(), lam=0.05))
    levels = tb.Multilevel(model, optimizer, coarse_steps=5, fine_steps=1)
    train(model, optimizer, range(8), levels.step)
    assert levels.restricted
    assert "layers.2" in levels.choices
    assert "(network)" not in levels.choices


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "parametrized", "pruned", "pruned, own"])
def test_layers_whose_weight_torch_computes_are_left_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for fast in (False, True):
        choose(monkeypatch, fast=fast)
        model = mlp()
        torch.manual_seed(0)
        computed(model[2], kind)
        with pytest.warns(UserWarning, match=r"Passed over in `model`: 2\."):
            groups = tb.param_groups(model, tb.L1(), lam=0.05)
        optimizer = OPTIMIZERS["adabreg"](groups)
        levels = tb.Multilevel(model, optimizer, coarse_steps=5, fine_steps=1)
        train(model, optimizer, range(14), levels.step)
        assert any(levels._modules.layers)
        assert levels.counts["coarse"] > 8
        results.append([p.detach().clone() for p in model.parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-11)


class Own(prune.BasePruningMethod):
    """A pruning of one's own: its hook is the user's, and computes the weight."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        return default_mask * (t > 0)


def computed(layer: nn.Module, kind: str) -> None:
    if kind == "weight_norm":
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(layer)
    elif kind == "spectral_norm":
        nn.utils.spectral_norm(layer)
    elif kind == "parametrized":
        nn.utils.parametrizations.weight_norm(layer)
    elif kind == "pruned":
        prune.l1_unstructured(layer, "weight", 0.4)
    else:
        Own.apply(layer, "weight")


def test_without_numba_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda: False)
    model = mlp()
    optimizer = OPTIMIZERS["adabreg"](tb.param_groups(model, tb.L1(), lam=0.05))
    with pytest.warns(UserWarning, match=r"pip install 'torch-bregman\[fast\]'"):
        levels = tb.Multilevel(model, optimizer)
    train(model, optimizer, range(8), levels.step)
    assert "pip install 'torch-bregman[fast]'" in str(levels.report)
    assert levels.report.to_dict() == {}


def test_what_needs_no_numba_does_not_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda: False)
    for regularizer, steps in ((tb.GroupL1("rows"), None), (tb.L1(), 0)):
        model = mlp()
        optimizer = OPTIMIZERS["adabreg"](tb.param_groups(model, regularizer, lam=0.05))
        assert not tb.Multilevel(model, optimizer, coarse_steps=steps).report.notes


def test_layers_in_half_precision_are_named() -> None:
    model = mlp().bfloat16()
    optimizer = OPTIMIZERS["adabreg"](tb.param_groups(model, tb.L1(), lam=0.05))
    (note,) = tb.Multilevel(model, optimizer).report.notes
    assert "torch.bfloat16 on cpu" in note
