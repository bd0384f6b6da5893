"""Gradients in coarse phases, as other people's loops clear, clip and change them: at the weights of the model."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import pairwise
from test_multilevel import FORMS, OPTIMIZERS, _double, batch, form, mlp  # noqa: F401 - fixtures
from torch import Tensor, nn
from torch.nn import functional as F

import torch_bregman as tb
from torch_bregman.multilevel import choice


def held(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def by_parts(model: nn.Module, optimizer: Any) -> None:
    for module in model.children():
        module.zero_grad()


def by_hand(model: nn.Module, optimizer: Any) -> None:
    for p in model.parameters():
        p.grad = None


def in_place(model: nn.Module, optimizer: Any) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.detach_()
            p.grad.zero_()


def deleted(model: nn.Module, optimizer: Any) -> None:
    for p in model.parameters():
        del p.grad


CLEAR: dict[str, Callable[[Any, Any], Any]] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "model, zeros": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "parts": by_parts,
    "by hand": by_hand,
    "in place": in_place,
    "deleted": deleted,
}


def scaled(change: Callable[[Any, float], Any]) -> Callable[[Any, Any], Any]:
    """A loop of one's own: half of the gradient, whatever it is."""

    def clip(model: nn.Module, optimizer: Any) -> None:
        for p in model.parameters():
            change(p, 0.5)

    return clip


def set_anew(p: Any, c: float) -> None:
    p.grad = p.grad * c


def data_anew(p: Any, c: float) -> None:
    p.grad.data = c * p.grad.data


def row_by_row(p: Any, c: float) -> None:
    for row in p.grad:
        row.mul_(c)


def by_blocks(p: Any, c: float) -> None:
    for block in p.grad.view(-1).split(7):
        block[:] *= c


HALF = {
    "optimizer": lambda model, optimizer: [p.grad.mul_(0.5) for p in held(optimizer) if p.grad is not None],
    "mul_": scaled(lambda p, c: p.grad.mul_(c)),
    "tensor": scaled(lambda p, c: p.grad.mul_(torch.tensor(c))),
    "div_": scaled(lambda p, c: p.grad.div_(1 / c)),
    "data": scaled(lambda p, c: p.grad.data.mul_(c)),
    "data, set": scaled(data_anew),
    "detach": scaled(lambda p, c: p.grad.detach().mul_(c)),
    "flat": scaled(lambda p, c: p.grad.view(-1).mul_(c)),
    "added": scaled(lambda p, c: p.grad.sub_(c * p.grad.clone())),
    "itself": scaled(lambda p, c: p.grad.sub_(p.grad, alpha=c)),
    "copied": scaled(lambda p, c: p.grad.copy_(c * p.grad)),
    "foreach": lambda model, optimizer: torch._foreach_mul_([p.grad for p in model.parameters()], 0.5),
    "set": scaled(set_anew),
    "rows": scaled(row_by_row),
    "blocks": scaled(by_blocks),
    "vector": lambda model, optimizer: nn.utils.vector_to_parameters(
        0.5 * nn.utils.parameters_to_vector([p.grad for p in model.parameters()]), [p.grad for p in model.parameters()]
    ),
}  # fmt: skip

CLIP: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    "norm": (
        lambda model, optimizer: nn.utils.clip_grad_norm_(model.parameters(), 0.05),
        lambda model, optimizer: nn.utils.clip_grad_norm_(held(optimizer), 0.05),
    ),
    "norm inf": (
        lambda model, optimizer: nn.utils.clip_grad_norm_(model.parameters(), 0.01, float("inf")),
        lambda model, optimizer: nn.utils.clip_grad_norm_(held(optimizer), 0.01, float("inf")),
    ),
    "value": (
        lambda model, optimizer: nn.utils.clip_grad_value_(model.parameters(), 0.001),
        lambda model, optimizer: nn.utils.clip_grad_value_(held(optimizer), 0.001),
    ),
    **{name: (half, HALF["optimizer"]) for name, half in HALF.items()},
}  # fmt: skip


def run(
    model: nn.Module, regularizer: tb.Regularizer, clear: Any, change: Any, micro: int, margin: float, name: str,
    steps: int = 12,
) -> list[Tensor]:  # fmt: skip
    optimizer = OPTIMIZERS[name](tb.param_groups(model, regularizer, lam=0.05))
    levels = tb.Multilevel(model, optimizer, coarse_steps=5, fine_steps=1, margin=margin)
    seen = []
    for i in range(steps):
        clear(model, optimizer)
        for j in range(micro):
            x, y = batch(micro * i + j)
            (F.cross_entropy(model(x), y) / micro).backward()
        change(model, optimizer)
        optimizer.step()
        seen.append(levels.restricted)
        levels.step()
    assert any(seen)
    return [p.detach().clone() for p in model.parameters()]


@pairwise(
    {
        "clear": CLEAR, "change": CLIP, "micro": [1, 3], "margin": [0.0, 1.0], "name": ["linbreg", "adabreg"],
        "form": FORMS,
    },
    indirect=["form"],
)  # fmt: skip
def test_any_way_to_clear_and_to_clip_takes_the_same_steps(
    clear: Any,
    change: Any,
    micro: int,
    margin: float,
    name: str,
    form: str,  # noqa: F811
) -> None:
    at_the_model, at_the_optimizer = change
    ours = run(mlp(), tb.L1(), clear, at_the_model, micro, margin, name)
    wanted = run(mlp(), tb.L1(), CLEAR["optimizer"], at_the_optimizer, micro, margin, name)
    for p, q in zip(ours, wanted, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("change", ["norm", "value", "rows", "set"])
@pytest.mark.parametrize("clear", ["model", "model, zeros"])
def test_the_same_in_a_compact_network(clear: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FASTER", float("inf"))
    changes = CLIP[change]
    ours = run(mlp(), tb.GroupL1("rows"), CLEAR[clear], changes[0], 2, 0.0, "adabreg")
    wanted = run(mlp(), tb.GroupL1("rows"), CLEAR["optimizer"], changes[1], 2, 0.0, "adabreg")
    for p, q in zip(ours, wanted, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def restricted(form: str, steps: int = 3) -> tuple[nn.Sequential, Any, tb.Multilevel]:  # noqa: F811
    """In a coarse phase, after a backward pass."""
    model = mlp()
    optimizer = OPTIMIZERS["adabreg"](tb.param_groups(model, tb.L1(), lam=0.05))
    levels = tb.Multilevel(model, optimizer, coarse_steps=50, fine_steps=1)
    for i in range(steps):
        backward(model, i, model)
        optimizer.step()
        levels.step()
    backward(model, steps, model)
    assert levels.restricted
    return model, optimizer, levels


def backward(model: nn.Module, i: int, clear: Any = None) -> None:
    x, y = batch(i)
    if clear is not None:
        clear.zero_grad()
    F.cross_entropy(model(x), y).backward()


LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "norm": lambda g: g.norm(),
    "norm 1": lambda g: g.norm(1),
    "vector_norm": lambda g: torch.linalg.vector_norm(g, 3.0),
    "vector_norm of rows": lambda g: torch.linalg.vector_norm(g, dim=1),
    "smallest": lambda g: torch.linalg.vector_norm(g, -float("inf")),
    "mean": lambda g: g.mean(),
    "square": lambda g: g.square().sum(),
    "max": lambda g: g.abs().max(),
    "finite": lambda g: torch.isfinite(g).all(),
    "clone": lambda g: g.clone(),
    "product": lambda g: g @ g.t(),
    "slice": lambda g: g[2:5, ::2] + 0,
    "transposed": lambda g: g.t().contiguous(),
    "split": lambda g: g.split(4)[1] + 0,
    "where": lambda g: g[g > 0],
    "numpy": lambda g: torch.from_numpy(g.cpu().detach().numpy()),
    "list": lambda g: torch.tensor(g.tolist()),
    "item": lambda g: torch.tensor(g[3, 4].item()),
    "float": lambda g: g.float(),
    "histogram": lambda g: torch.histc(g, 5),
    "deepcopy": copy.deepcopy,
    "out of place": lambda g: torch.zeros(15, 20).add_(g),
    "cosine": lambda g: F.cosine_similarity(g.flatten(), g.flatten(), dim=0),
}


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_at_a_gradient_sees_that_of_the_live_weights(look: str, form: str) -> None:  # noqa: F811
    model, _, levels = restricted(form)
    twin = copy.deepcopy(model)
    backward(twin, 3)
    live = next(part.live for part in levels._exchange.parts if part.live.full is model[2].weight)
    wanted = torch.zeros(15, 20)
    live.where.prolong(live.where.restrict(twin[2].weight.grad), wanted)
    grad = model[2].weight.grad
    assert grad is not None
    assert int(wanted.count_nonzero()) < int(twin[2].weight.grad.count_nonzero())
    assert (grad.shape, grad.dtype, grad.device) == (wanted.shape, wanted.dtype, wanted.device)
    seen = LOOKS[look](grad)
    assert type(seen) is Tensor
    torch.testing.assert_close(seen, LOOKS[look](wanted))
    torch.testing.assert_close(live.values.grad, live.where.restrict(wanted))


def test_gradients_print_and_are_saved_as_ordinary_tensors(form: str) -> None:  # noqa: F811
    model, _, _ = restricted(form)
    grad = model[2].weight.grad
    assert grad is not None
    assert repr(grad) == repr(grad.clone())
    assert repr(model[2].weight) == repr(nn.Parameter(model[2].weight.detach()))
    file = io.BytesIO()
    torch.save(grad, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded) is Tensor
    assert torch.equal(loaded, grad.clone())


def test_gradients_that_were_kept_by_reference_stay_what_they_were(form: str) -> None:  # noqa: F811
    """Two losses, whose gradients are combined by hand."""
    model, optimizer, _ = restricted(form)
    first = [p.grad for p in model.parameters()]
    before = [p.grad.clone() for p in held(optimizer)]
    backward(model, 4, model)
    second = [p.grad.clone() for p in held(optimizer)]
    assert not torch.equal(first[0].clone(), model[0].weight.grad.clone())
    for p, g in zip(model.parameters(), first, strict=True):
        p.grad = p.grad + g
    for p, a, b in zip(held(optimizer), before, second, strict=True):
        torch.testing.assert_close(p.grad, a + b)
    for p, g in zip(model.parameters(), first, strict=True):
        p.grad = g
    for p, a in zip(held(optimizer), before, strict=True):
        assert torch.equal(p.grad, a)


def test_a_layer_that_was_cleared_and_not_used_does_not_move(form: str) -> None:  # noqa: F811
    model, optimizer, levels = restricted(form)
    for _ in range(2):
        model.zero_grad()
        before = model[0].weight.detach().clone()
        x = torch.randn(9, 20)
        F.cross_entropy(model[2:](x), batch(0)[1]).backward()
        assert model[0].weight.grad is None
        assert model[2].weight.grad is not None
        assert optimizer.param_groups[0]["params"][0].grad is None
        optimizer.step()
        levels.step()
        assert torch.equal(model[0].weight, before)


def test_a_phase_that_ends_between_two_micro_batches_keeps_the_gradient(form: str) -> None:  # noqa: F811
    model, _, levels = restricted(form)
    grad = model[2].weight.grad
    assert grad is not None
    wanted = grad.clone()
    levels.leave()
    assert type(model[2].weight) is nn.Parameter
    assert type(model[2].weight.grad) is Tensor
    assert torch.equal(model[2].weight.grad, wanted)
    backward(model, 5)
    twin = copy.deepcopy(model)
    backward(twin, 5)
    torch.testing.assert_close(model[2].weight.grad, wanted + twin[2].weight.grad)


def test_a_network_tells_its_arguments_as_ever(form: str) -> None:  # noqa: F811
    """Transformers' Trainer asks for them, to see what of the data the model takes."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()

        def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Tensor:
            return self.layers(pixels)

    model = Named()
    tb.Multilevel(model, OPTIMIZERS["adabreg"](tb.param_groups(model, tb.L1(), lam=0.05)))
    assert list(inspect.signature(model.forward).parameters) == ["pixels", "labels"]
    assert list(inspect.signature(model.layers[0].forward).parameters) == ["input"]
    assert model(labels=None, pixels=batch(0)[0]).shape == (9, 3)


def test_a_gradient_of_another_shape_is_refused_as_ever(form: str) -> None:  # noqa: F811
    model, _, _ = restricted(form)
    with pytest.raises(RuntimeError, match="size"):
        model[2].weight.grad = torch.zeros(3)
    assert model[2].weight.grad is not None


def test_gradients_cannot_be_sent_to_other_ranks(form: str, tmp_path: Any) -> None:  # noqa: F811
    model, _, _ = restricted(form)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match=r"give Multilevel the DistributedDataParallel"):
            torch.distributed.all_reduce(model[2].weight.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_steps_that_a_scaler_skips_leave_nothing_behind(form: str) -> None:  # noqa: F811
    """Infinite gradients in a coarse phase, with all that is clipped and cleared at the model."""
    results = []
    for bad in (False, True):
        model = mlp()
        optimizer = OPTIMIZERS["adabreg"](tb.param_groups(model, tb.L1(), lam=0.05))
        levels = tb.Multilevel(model, optimizer, coarse_steps=5, fine_steps=1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        for i in range(10):
            for times in (float("inf"), 1.0) if bad and i == 4 else (1.0,):
                x, y = batch(i)
                model.zero_grad()
                scaler.scale(times * F.cross_entropy(model(x), y)).backward()
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                assert bool(norm.isfinite()) == (times == 1.0)
                scaler.step(optimizer)
                scaler.update()
                if times == 1.0:
                    levels.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(bool(p.isfinite().all()) for p in results[1])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pairwise({"margin": [0.0, 1.0], "images": [False, True], "coarse": [1, 3], "penalty": ["input", "biases"]})
def test_penalties_on_gradients_are_differentiated(
    margin: float, images: bool, coarse: int, penalty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradient penalties, equations that a network shall fulfil: gradients of gradients, in fine and coarse steps."""
    results = []
    for fast in (False, True):
        for name in ("FASTER", "ABLE"):
            monkeypatch.setattr(choice, name, float("inf") if fast else 0.0)
        torch.manual_seed(0)
        model = mlp()
        if images:
            model = nn.Sequential(
                nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3), nn.Tanh(), nn.Flatten(),
                nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 3),
            )  # fmt: skip
            tb.sparse_init_(model, 0.4)
        optimizer = OPTIMIZERS["linbreg"](tb.param_groups(model, tb.L1(), lam=0.01))
        levels = tb.Multilevel(model, optimizer, coarse_steps=coarse, fine_steps=1, margin=margin)
        for i in range(8):
            x, y = batch(i, (1, 8, 8) if images else (12,))
            x.requires_grad_()
            model.zero_grad()
            loss = F.cross_entropy(model(x), y)
            of = [x] if penalty == "input" else [p for n, p in model.named_parameters() if n.endswith("bias")]
            parts = torch.autograd.grad(loss, of, create_graph=True)
            (loss + 0.1 * sum(g.square().sum() for g in parts)).backward()
            optimizer.step()
            levels.step()
        results.append([p.detach().clone() for p in model.parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-11)


def test_gradients_that_are_to_be_differentiated_where_they_lie_are_refused(form: str) -> None:  # noqa: F811
    model, _, _ = restricted(form)
    model.zero_grad()
    x, y = batch(0)

    def look() -> None:
        F.cross_entropy(model(x), y).backward(create_graph=True)
        assert model[0].weight.grad is not None

    with pytest.raises(RuntimeError, match=r"call torch.autograd.grad"):
        look()


@pairwise(
    {"regularizer": [tb.L1(), tb.GroupL1("rows")], "bad": [0, 2, 4, 5], "amp": [False, True], "fast": [False, True]}
)
def test_a_skipped_step_moves_nothing_and_the_next_ones_go_on(
    regularizer: tb.Regularizer, bad: int, amp: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a loop with autocast has it, which calls all that is to be called whether the scaler has stepped or not."""
    for name in ("FASTER", "ABLE"):
        monkeypatch.setattr(choice, name, float("inf") if fast else 0.0)
    model = mlp().float()
    optimizer = OPTIMIZERS["adabreg"](tb.param_groups(model, regularizer, lam=0.05))
    levels = tb.Multilevel(model, optimizer, coarse_steps=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(12):
        x, y = batch(i)
        model.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model(x.float()).float(), y)
        scaler.scale(loss * (float("inf") if i == bad else 1.0)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        levels.step()
        assert all(map(torch.equal, before, model.parameters())) == (i == bad)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_closures_that_clear_and_clip_at_the_model(form: str) -> None:  # noqa: F811
    results = []
    for closure in (False, True):
        model = mlp()
        optimizer = OPTIMIZERS["adabreg"](tb.param_groups(model, tb.L1(), lam=0.05))
        levels = tb.Multilevel(model, optimizer, coarse_steps=4)
        for i in range(12):

            def loss(model: Any = model, optimizer: Any = optimizer, closure: bool = closure, i: int = i) -> Tensor:
                x, y = batch(i)
                (model if closure else optimizer).zero_grad()
                total = F.cross_entropy(model(x), y)
                total.backward()
                nn.utils.clip_grad_norm_(list(model.parameters()) if closure else held(optimizer), 0.05)
                return total

            if closure:
                optimizer.step(loss)
            else:
                loss()
                optimizer.step()
            levels.step()
        results.append([p.detach().clone() for p in model.parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_two_backward_passes_over_one_graph_add_up(form: str) -> None:  # noqa: F811
    model, optimizer, _ = restricted(form)
    once = [p.grad.clone() for p in held(optimizer)]
    model.zero_grad()
    x, y = batch(3)
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    for p, g in zip(held(optimizer), once, strict=True):
        torch.testing.assert_close(p.grad, 3 * g)
