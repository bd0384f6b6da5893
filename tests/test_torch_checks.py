"""What PyTorch asks of its own optimizers, asked of ours, and what the method is without a regulariser.

The checks follow PyTorch's test/test_optim.py (TestOptimRenewed, and the scheduler and SWA tests beside it), written
anew. `torch.testing._internal.common_optimizers` is not imported: it needs the package `expecttest` and is private, so
`Input`, `Refused` and `Info` below play the parts of its OptimizerInput, ErrorOptimizerInput and OptimizerInfo.

Checks of PyTorch that do not apply, and why:

* test_capturable, test_peak_memory_foreach, test_foreach_large_tensor, test_forloop_goes_right_direction_multigpu,
  test_mixed_device_dtype, test_state_dict_with_cuda_params, test_cpu_load_state_dict: they need a GPU; there is no
  `capturable` option, and CUDA graphs are not promised.
* test_fused_*: the fused step has its own file, test_fused.py.
* test_grad_scaling_autocast_fused_optimizers: GradScaler divides the gradients itself; it is checked with every step.
* TestDifferentiableOptimizer: there is no `differentiable` option; weights are written in place under no_grad.
* test_complex, test_complex_2d: a soft threshold of complex numbers is not defined here. Refused, which is checked.
* Sparse gradients (test_rosenbrock_sparse): refused, which is checked. Compressed layouts cannot even be a gradient.
* Tensor betas, weight_decay of Adam as a tensor: only lr and lam may be tensors.
* Checks of LBFGS, SparseAdam, Adafactor, Muon, ASGD, amsgrad, decoupled decay: other algorithms.
* test_defaults_changed_to_foreach: it looks for calls of torch's private _multi_tensor functions. Here it is asked how
  many tensors arrive together.
"""

from __future__ import annotations

import copy
import functools
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import FLOATS, PATHS, pairwise, through_disk, with_rates
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedule
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import torch_bregman as tb

# ---------------------------------------------------------------------- the table: what PyTorch calls OptimizerInfo


@dataclass(frozen=True)
class Input:
    """Options for a constructor."""

    kwargs: dict[str, Any]
    desc: str


@dataclass(frozen=True)
class Refused:
    """Parameters and options that must not be accepted."""

    make: Callable[[], tuple[Any, dict[str, Any]]]
    desc: str
    error: type[Exception]
    match: str


GENERAL = [
    Input({}, "default"),
    Input({"lr": 0.003}, "another lr"),
    Input({"weight_decay": 0.1}, "weight decay"),
    Input({"maximize": True}, "maximize"),
    Input({"weight_decay": 0.1, "maximize": True}, "weight decay and maximize"),
    Input({"lr": torch.tensor(0.002)}, "tensor lr"),
]
DELTA = [Input({"delta": 0.5}, "delta"), Input({"delta": 2.0, "weight_decay": 0.1}, "delta and weight decay")]
ADAM = [
    Input({"betas": (0.8, 0.99)}, "betas"),
    Input({"eps": 1e-3}, "eps"),
    Input({"weight_decay": 0.1, "decoupled_weight_decay": True}, "decoupled weight decay"),
    Input({"betas": (0.0, 0.9)}, "no momentum"),
]


@dataclass(frozen=True)
class Info:
    """One optimizer under test, the torch optimizer that it is without a regulariser, and its inputs."""

    name: str
    cls: type
    base: dict[str, Any]
    twin: Callable[..., torch.optim.Optimizer]
    inputs: list[Input] = field(default_factory=list)
    has_state: bool = True

    def build(self, params: Any, penalty: str = "none", **kwargs: Any) -> Any:
        extra = {"regularizer": tb.L1(), "lam": 0.05} if penalty == "l1" else {}
        fresh = copy.deepcopy(kwargs)  # schedulers write into a tensor lr
        return self.cls(params, **{**self.base, **extra, **fresh})


RATED = with_rates(
    {
        "linbreg": 0.01,
        "linbreg-paper": 0.05,
        "linbreg-sgd": 0.01,
        "linbreg-nesterov": 0.01,
        "adabreg": 0.01,
        "proxsgd": 0.01,
        "proxsgd-nesterov": 0.01,
    }
)
SGD, ADAM_TWIN = torch.optim.SGD, torch.optim.Adam
INFOS = {
    info.name: info
    for info in [
        Info("LinBreg", *RATED["linbreg"], functools.partial(SGD, lr=0.01), GENERAL + DELTA),
        Info(
            "LinBreg-paper",
            *RATED["linbreg-paper"],
            functools.partial(SGD, lr=0.05, momentum=0.9),  # for its options; its rule is another
            GENERAL + DELTA,
        ),
        Info(
            "LinBreg-sgd",
            *RATED["linbreg-sgd"],
            functools.partial(SGD, lr=0.01, momentum=0.9),
            GENERAL + DELTA,
        ),
        Info(
            "LinBreg-nesterov",
            *RATED["linbreg-nesterov"],
            functools.partial(SGD, lr=0.01, momentum=0.9, nesterov=True),
            GENERAL + DELTA,
        ),
        Info("AdaBreg", *RATED["adabreg"], functools.partial(ADAM_TWIN, lr=0.01), GENERAL + DELTA + ADAM),
        Info("ProxSGD", *RATED["proxsgd"], functools.partial(SGD, lr=0.01), GENERAL, has_state=False),
        Info(
            "ProxSGD-nesterov",
            *RATED["proxsgd-nesterov"],
            functools.partial(SGD, lr=0.01, momentum=0.9, nesterov=True),
            GENERAL,
        ),
    ]
}
each = pytest.mark.parametrize("info", INFOS.values(), ids=INFOS.keys())
PENALTIES = ["none", "l1"]
penalised = pytest.mark.parametrize("penalty", PENALTIES)
IDENTICAL = [info for name, info in INFOS.items() if name != "LinBreg-paper"]
identical = pytest.mark.parametrize("info", IDENTICAL, ids=[info.name for info in IDENTICAL])
INPUTS = {given.desc.replace(" ", "_"): given for info in INFOS.values() for given in info.inputs}


def with_inputs(more: dict[str, Any] | None = None) -> pytest.MarkDecorator:
    """Every optimizer with each of its inputs, and `more` options spread over them."""
    return pairwise(
        {"info": INFOS, "given": INPUTS, **(more or {})},
        where=lambda info, given, **_: any(given is own for own in info.inputs),
    )


def thinned(p: Tensor) -> Tensor:
    """Two of three entries zero: a start that needs no warning."""
    with torch.no_grad():
        p.view(-1)[torch.arange(p.numel()) % 3 != 0] = 0
    return p


def network(dtype: torch.dtype = torch.float32, *, sparse: bool = True, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    if sparse:
        for p in model.parameters():
            thinned(p)
    return model


def batch(k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k % 4)
    x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.stack([x[:, 0] - x[:, 1], x[:, 2].sin(), x[:, 3] * 0.5], 1).to(dtype)


def train(model: nn.Module, optimizer: Any, steps: int, scheduler: Any = None, first: int = 0) -> list[float]:
    losses = []
    for k in range(first, first + steps):
        x, y = batch(k, next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def same_tree(a: Any, b: Any) -> None:
    """Equal nested containers, tensors to the last bit and with their dtype."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, dict):
        assert set(a) == set(b)
        for key in a:
            same_tree(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert type(a) is type(b)
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same_tree(x, y)
    else:
        assert type(a) is type(b)
        assert a == b


def differs(a: nn.Module, b: nn.Module) -> bool:
    return any(not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---------------------------------------------------------------------- construction


@each
def test_inputs_do_not_choose_an_implementation(info: Info) -> None:
    """The table leaves foreach and fused to the checks that are about them."""
    assert info.inputs
    for given in info.inputs:
        assert not {"foreach", "fused", "differentiable"} & set(given.kwargs), given.desc
        info.build([thinned(torch.ones(4))], **given.kwargs)


def _param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*(shape or (2, 2)), generator=torch.Generator().manual_seed(0)))


def _twice() -> tuple[Any, dict[str, Any]]:
    p = _param()
    return [{"params": p}, {"params": p}], {}


def _half_named() -> tuple[Any, dict[str, Any]]:
    return [("weight", _param()), _param()], {}


def _groups_half_named() -> tuple[Any, dict[str, Any]]:
    return [{"params": [_param()], "lr": 0.1}, {"params": [("weight", _param())]}], {}


def _bad(**kwargs: Any) -> Callable[[], tuple[Any, dict[str, Any]]]:
    return lambda: ([_param()], kwargs)


REFUSED = [
    Refused(lambda: (_param(), {}), "a tensor instead of a list", TypeError, "iterable of Tensors or dicts"),
    Refused(lambda: ([], {}), "no parameters", ValueError, "empty parameter list"),
    Refused(lambda: ([3.0], {}), "not a tensor", TypeError, "can only optimize Tensors"),
    Refused(lambda: ([_param() * 2], {}), "not a leaf", ValueError, "non-leaf"),
    Refused(lambda: ([{"params": {_param()}}], {}), "a set", TypeError, "ordered collections"),
    Refused(_twice, "one parameter in two groups", ValueError, "more than one parameter group"),
    Refused(_half_named, "names for some parameters", ValueError, "with/without names"),
    Refused(_groups_half_named, "names for some groups", ValueError, "with/without names"),
    Refused(_bad(lr=-1.0), "lr", ValueError, "lr.*-1.0"),
    Refused(_bad(lr=torch.tensor([0.1, 0.1])), "lr of two elements", ValueError, "lr.*one element"),
    Refused(_bad(weight_decay=-0.5), "weight decay", ValueError, "weight_decay.*-0.5"),
    Refused(_bad(foreach=True, fused=True), "foreach and fused", ValueError, "fused"),
]
OF_LINBREG = [
    Refused(_bad(momentum=-0.5), "momentum", ValueError, "momentum.*-0.5"),
    Refused(_bad(nesterov=True, momentum=0.0), "nesterov without momentum", ValueError, "nesterov"),
]
OF_ADABREG = [
    Refused(_bad(betas=(1.0, 0.0)), "beta1", ValueError, "betas.*1.0"),
    Refused(_bad(betas=(0.0, -1.0)), "beta2", ValueError, "betas.*-1.0"),
    Refused(_bad(eps=-1e-8), "eps", ValueError, "eps.*-1e-08"),
]


@pytest.mark.parametrize(
    ("cls", "refused"),
    [
        pytest.param(cls, r, id=f"{cls.__name__}-{r.desc.replace(' ', '_')}")
        for cls, own in ((tb.LinBreg, OF_LINBREG), (tb.AdaBreg, OF_ADABREG), (tb.ProxSGD, OF_LINBREG))
        for r in REFUSED + own
    ],
)
def test_errors(cls: type, refused: Refused) -> None:
    params, kwargs = refused.make()
    with pytest.raises(refused.error, match=refused.match):
        cls(params, **kwargs)


@each
def test_duplicate_parameters_in_one_group_warn(info: Info) -> None:
    p = _param()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        info.build([p, p])


@each
def test_unknown_options_are_refused(info: Info) -> None:
    for name in ("capturable", "differentiable", "dampening", "amsgrad"):
        with pytest.raises(TypeError, match=name):
            info.build([_param()], **{name: True})


@each
def test_complex_is_refused(info: Info) -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = info.build([p])
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="complex"):
        optimizer.step()
    assert torch.equal(p, torch.ones_like(p))


@each
def test_sparse_gradients_are_refused(info: Info) -> None:
    p = nn.Parameter(torch.ones(3, 3))
    optimizer = info.build([p])
    p.grad = torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"sparse gradients"):
        optimizer.step()
    assert torch.equal(p, torch.ones_like(p))


@with_inputs()
def test_can_be_printed(info: Info, given: Input) -> None:
    optimizer = info.build([{"params": [_param()]}, {"params": [_param()], "lr": 0.5}], **given.kwargs)
    for text in (repr(optimizer), str(optimizer)):
        assert text.startswith(f"{info.cls.__name__} (")
        assert "Parameter Group 1" in text
        assert "lr: 0.5" in text
        assert "regularizer: none" in text


# ---------------------------------------------------------------------- steps


@penalised
@each
def test_param_groups_lr(info: Info, penalty: str) -> None:
    """A group with lr 0 rests, the others learn; the defaults fill what a group leaves out."""
    model = network()
    groups = [{"params": [model[0].weight], "lr": 0.0}, {"params": [model[2].weight], "lr": 0.02}]
    rest = [model[0].bias, model[2].bias]
    optimizer = info.build([*groups, {"params": rest}], penalty, lr=0.01)
    assert [g["lr"] for g in optimizer.param_groups] == [0.0, 0.02, 0.01]
    still = model[0].weight.detach().clone()
    losses = train(model, optimizer, 60)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(model[0].weight.detach(), still, rtol=0, atol=1e-6 if penalty == "l1" else 0)


@penalised
@each
def test_param_groups_weight_decay(info: Info, penalty: str) -> None:
    decayed, plain = thinned(_param(6, 6)), thinned(_param(6, 6))
    optimizer = info.build([{"params": [decayed], "weight_decay": 0.5}, {"params": [plain]}], penalty, weight_decay=0.0)
    before = decayed.detach().clone()
    for _ in range(20):
        for p in (decayed, plain):
            p.grad = torch.zeros_like(p)
        optimizer.step()
    live = before != 0
    assert bool((decayed[live].abs() < before[live].abs()).all())
    if info.cls is tb.ProxSGD and penalty == "l1":  # it shrinks all by itself, but less
        assert bool((plain[live].abs() >= decayed[live].abs()).all())
        assert not torch.equal(plain, decayed)
    else:
        torch.testing.assert_close(plain.detach(), before, rtol=1e-5, atol=1e-6)


SCHEDULERS: dict[str, Callable[[Any], list[Any]]] = {
    "step": lambda o: [schedule.StepLR(o, step_size=10, gamma=0.9)],
    "plateau": lambda o: [schedule.ReduceLROnPlateau(o)],
    "step-and-plateau": lambda o: [schedule.StepLR(o, 10, 0.9), schedule.ReduceLROnPlateau(o)],
    "exponential-and-plateau": lambda o: [schedule.ExponentialLR(o, 0.99), schedule.ReduceLROnPlateau(o)],
    "linear-and-exponential": lambda o: [schedule.LinearLR(o, 0.4, total_iters=4), schedule.ExponentialLR(o, 0.99)],
}


def fit_line(info: Info, given: Input, *, contiguous: bool, schedulers: str, groups: bool) -> tuple[list[float], Any]:
    generator = torch.Generator().manual_seed(1)
    shape = (10, 5)
    if contiguous:
        weight, bias = torch.randn(shape, generator=generator), torch.randn(10, generator=generator)
    else:
        weight = torch.randn(*shape, 2, generator=generator)[..., 0]
        bias = torch.randn(10, 2, generator=generator)[..., 0]
        assert not weight.is_contiguous()
    weight, bias = nn.Parameter(weight), nn.Parameter(bias)
    x = torch.randn(5, generator=generator)
    params = [{"params": [weight]}, {"params": [bias], "lr": 0.005}] if groups else [weight, bias]
    optimizer = info.build(params, **given.kwargs)
    chosen = SCHEDULERS[schedulers](optimizer)
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).square().sum()
        loss.backward()
        return loss

    for _ in range(20):
        losses.append(optimizer.step(closure).item())
        for scheduler in chosen:
            if isinstance(scheduler, schedule.ReduceLROnPlateau):
                scheduler.step(losses[-1])
            else:
                scheduler.step()
    losses.append(closure().item())
    return losses, weight


@with_inputs(
    {
        "layout,schedulers": {
            "strided-plateau": ("strided", "plateau"),
            "groups-step": ("groups", "step"),
            **{f"contiguous-{name}": ("contiguous", name) for name in SCHEDULERS if "-" in name},
        }
    }
)
def test_goes_in_the_right_direction(info: Info, given: Input, layout: str, schedulers: str) -> None:
    losses, weight = fit_line(
        info, given, contiguous=layout != "strided", schedulers=schedulers, groups=layout == "groups"
    )
    assert (losses[-1] > losses[0]) if given.kwargs.get("maximize") else (losses[-1] < losses[0])
    assert weight.is_contiguous() == (layout != "strided")


@with_inputs()
def test_layout_does_not_change_the_numbers(info: Info, given: Input) -> None:
    """A strided weight is updated as its contiguous copy, also where weight and gradient have other strides."""
    strided = nn.Parameter(thinned(_param(7, 6)).detach().t())
    plain = nn.Parameter(strided.detach().contiguous())
    assert not strided.is_contiguous()
    optimizers = [info.build([p], "l1", **given.kwargs) for p in (strided, plain)]
    for k in range(5):
        grad = torch.randn(6, 7, generator=torch.Generator().manual_seed(k))
        for p, optimizer in zip((strided, plain), optimizers, strict=True):
            p.grad = grad.clone()
            optimizer.step()
    assert torch.equal(strided, plain)
    assert not strided.is_contiguous()


@pairwise({"info": INFOS, "penalty": PENALTIES, "shape": {"0d": (), "1d": (1,)}})
def test_tensor_lr(info: Info, penalty: str, shape: tuple[int, ...]) -> None:
    """A tensor lr is the float lr, also while a scheduler changes it, and it stays that tensor."""
    lr = torch.full(shape, 0.0078125)
    for make in (None, lambda o: schedule.ExponentialLR(o, 0.5), lambda o: schedule.StepLR(o, 3, 0.25)):
        model, other = network(), network()
        a, b = (
            info.build(model.parameters(), penalty, lr=lr.clone()),
            info.build(other.parameters(), penalty, lr=lr.item()),
        )
        held = a.param_groups[0]["lr"]
        train(model, a, 8, make and make(a))
        train(other, b, 8, make and make(b))
        assert a.param_groups[0]["lr"] is held, "a graph or a user holds on to it"
        assert held.item() == b.param_groups[0]["lr"]
        assert held.shape == shape
        same_weights(model, other)
        assert differs(model, network())


def mixed_parameters() -> list[nn.Parameter]:
    """Shapes, dtypes and sizes as they come; some are empty, one has no dimensions."""
    generator = torch.Generator().manual_seed(2)
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((4, 3), torch.float32),
        ((0,), torch.float32),
        ((5,), torch.float64),
        ((2, 3, 2), torch.bfloat16),
        ((3, 0, 2), torch.float64),
        ((6,), torch.float16),
        ((), torch.float32),
        ((1, 9), torch.float32),
    ]
    params = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(d)) for s, d in shapes]
    for p in params:
        if p.dim():
            thinned(p)
        else:
            p.data.zero_()
    return params


@with_inputs({"penalty": PENALTIES})
def test_foreach_matches_forloop(info: Info, given: Input, penalty: str) -> None:
    sets = [mixed_parameters() for _ in range(3)]
    optimizers = [
        info.build(params, penalty, foreach=foreach, **given.kwargs)
        for params, foreach in zip(sets, (False, True, None), strict=True)
    ]
    start = [p.detach().clone() for p in sets[0]]
    for k in range(8):
        generator = torch.Generator().manual_seed(k)
        for rows in zip(*sets, strict=True):
            grad = 3 * torch.randn(rows[0].shape, generator=generator, dtype=torch.float64).to(rows[0].dtype)
            for p in rows:
                p.grad = grad.clone() if k % 4 != 3 or p.dim() == 1 else None  # now and then some have none
        for optimizer in optimizers:
            optimizer.step()
    for rows in zip(*sets, strict=True):
        for p in rows[1:]:
            assert torch.equal(p, rows[0])
    same_tree(optimizers[1].state_dict()["state"], optimizers[0].state_dict()["state"])
    assert any(not torch.equal(p, q) for p, q in zip(sets[0], start, strict=True))


@each
def test_foreach_decides_how_many_tensors_go_together(info: Info, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    original = info.cls._update

    def counting(self: Any, params: list[Tensor], *rest: Any) -> None:
        counts.append(len(params))
        original(self, params, *rest)

    monkeypatch.setattr(info.cls, "_update", counting)
    for foreach, expected in ((True, [3]), (False, [1, 1, 1]), (None, [1, 1, 1])):  # None is for the GPU
        params = [_param() for _ in range(3)]
        optimizer = info.build(params, foreach=foreach)
        for p in params:
            p.grad = torch.ones_like(p)
        counts.clear()
        optimizer.step()
        assert counts == expected


@penalised
@each
def test_another_default_dtype(info: Info, penalty: str) -> None:
    """Counters and weights do not depend on torch's default dtype."""
    model, other = network(), network()
    train(model, info.build(model.parameters(), penalty), 5)
    optimizer = info.build(other.parameters(), penalty, foreach=True)
    torch.set_default_dtype(torch.float64)
    try:
        train(other, optimizer, 5)
    finally:
        torch.set_default_dtype(torch.float32)
    same_weights(model, other)
    for state in optimizer.state.values():
        assert all(v.dtype == torch.float32 for v in state.values() if isinstance(v, Tensor))


@with_inputs({"penalty": PENALTIES})
def test_step_without_gradients_is_a_noop(info: Info, given: Input, penalty: str) -> None:
    model = network(sparse=False)  # no state is made, so nobody warns of the dense start either
    optimizer = info.build(model.parameters(), penalty, **given.kwargs)
    before = copy.deepcopy(model)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    model.zero_grad()
    optimizer.step()
    same_weights(model, before)
    same_tree(optimizer.state_dict(), state)
    assert not optimizer.state


@with_inputs({"penalty": PENALTIES})
def test_step_with_zero_gradients_is_a_noop(info: Info, given: Input, penalty: str) -> None:
    model = network()
    optimizer = info.build(model.parameters(), penalty, **{**given.kwargs, "weight_decay": 0.0})
    before = copy.deepcopy(model)
    for _ in range(5):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    if info.cls is tb.ProxSGD and penalty == "l1":  # it shrinks weights without any gradient: that is its bias
        shrunk = 5 * float(optimizer.param_groups[0]["lr"]) * optimizer.param_groups[0]["lam"]
        for p, q in zip(model.parameters(), before.parameters(), strict=True):
            expected = q.sign() * (q.abs() - shrunk).clamp_min(0)
            torch.testing.assert_close(p.detach(), expected.detach(), rtol=1e-5, atol=1e-7)
        return
    exact = penalty == "none" and given.kwargs.get("delta", 1.0) in (0.5, 1.0, 2.0)
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=0 if exact else 1e-7)
        assert torch.equal(p != 0, q != 0)


@with_inputs({"penalty": PENALTIES})
def test_gradients_are_neither_changed_nor_kept(info: Info, given: Input, penalty: str) -> None:
    """They may be overwritten in place between steps, as zero_grad(set_to_none=False) and DDP's buckets do."""
    params = [thinned(_param(3, 3)), thinned(_param(3, 3))]
    reused, fresh = (info.build([p], penalty, **given.kwargs) for p in params)
    buffer = torch.zeros(3, 3)
    params[0].grad = buffer
    for k in range(4):
        grad = torch.randn(3, 3, generator=torch.Generator().manual_seed(k))
        buffer.copy_(grad)
        params[1].grad = grad.clone()
        for optimizer in (reused, fresh):
            optimizer.step()
        assert torch.equal(buffer, grad)
        assert params[0].grad is buffer
    assert torch.equal(params[0], params[1])


@penalised
@each
def test_state_is_there_after_a_step(info: Info, penalty: str) -> None:
    model = network()
    optimizer = info.build(model.parameters(), penalty)
    assert not optimizer.state
    train(model, optimizer, 1)
    if info.has_state:
        assert len(optimizer.state) == 4
        assert all(len(state) > 0 for state in optimizer.state.values())
    else:
        assert not optimizer.state


@penalised
@each
def test_zero_grad_and_new_groups(info: Info, penalty: str) -> None:
    model, extra = network(), thinned(_param(3, 3))
    optimizer = info.build(model.parameters(), penalty, lr=0.01)
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": extra, "lr": 0.5})
    assert optimizer.param_groups[1]["params"] == [extra]
    assert set(optimizer.param_groups[0]) == set(optimizer.param_groups[1])
    before = extra.detach().clone()
    extra.grad = torch.ones_like(extra)
    optimizer.step()
    assert not torch.equal(extra, before)
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(extra.grad, torch.zeros_like(extra))
    optimizer.zero_grad()
    assert extra.grad is None
    assert all(p.grad is None for p in model.parameters())
    for wrong, error in (({"params": extra}, ValueError), ("params", (TypeError, ValueError))):
        with pytest.raises(error):
            optimizer.add_param_group(wrong)
    assert len(optimizer.param_groups) == 2
    train(model, optimizer, 1)


@each
def test_groups_do_not_reach_the_defaults(info: Info) -> None:
    given = {"params": [_param()], "lr": 0.25}
    optimizer = info.build([given, {"params": [_param()]}], lr=0.5)
    defaults = copy.deepcopy(optimizer.defaults)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 7.0, 1.0
    assert optimizer.defaults == defaults
    assert defaults["lr"] == 0.5
    assert given["lr"] == 0.25, "the caller's dict is the caller's"
    assert set(given) == {"params", "lr"}
    optimizer.add_param_group({"params": [_param()]})
    assert optimizer.param_groups[2]["lr"] == 0.5


@each
def test_step_has_a_name_for_the_profiler(info: Info) -> None:
    p = _param()
    optimizer = info.build([p])
    p.grad = torch.ones_like(p)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        optimizer.step()
    assert f"Optimizer.step#{info.cls.__name__}.step" in {event.key for event in profile.key_averages()}


# ---------------------------------------------------------------------- saving and loading


@penalised
@each
def test_state_dict_is_deterministic(info: Info, penalty: str) -> None:
    first = []
    for _ in range(2):
        model = network()
        optimizer = info.build(model.parameters(), penalty)
        train(model, optimizer, 4)
        first.append(optimizer.state_dict())
    same_tree(first[0], first[1])
    same_tree(optimizer.state_dict(), first[1])  # asking changes nothing


@with_inputs({"penalty": PENALTIES})
def test_loading_brings_back_all_of_it(info: Info, given: Input, penalty: str) -> None:
    """What is saved, loaded into another optimizer and saved again is the same, keys included."""
    model = network()
    optimizer = info.build(model.parameters(), penalty, **given.kwargs)
    train(model, optimizer, 4)
    saved = through_disk(optimizer.state_dict())
    same_tree(saved, optimizer.state_dict())
    other = info.build(copy.deepcopy(model).parameters(), penalty, lr=0.9)
    other.load_state_dict(saved)
    same_tree(other.state_dict(), saved)


@with_inputs({"penalty": PENALTIES, "dtype": [torch.float32, torch.bfloat16]})
def test_goes_on_after_loading_as_without(info: Info, given: Input, penalty: str, dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = info.build(model.parameters(), penalty, **given.kwargs)
    train(model, optimizer, 4)
    saved = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other = network(dtype, seed=5)
    resumed = info.build(other.parameters(), penalty)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(model, optimizer, 4, first=4)
    train(other, resumed, 4, first=4)
    same_weights(model, other)
    same_tree(resumed.state_dict()["state"], optimizer.state_dict()["state"])


@penalised
@each
def test_loads_older_state_dicts(info: Info, penalty: str) -> None:
    """Options that are younger than the file get their defaults."""
    model = network()
    optimizer = info.build(model.parameters(), penalty)
    train(model, optimizer, 3)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for name in ("maximize", "foreach", "fused"):
            del group[name]
    other = copy.deepcopy(model)
    loaded = info.build(other.parameters(), penalty)
    loaded.load_state_dict(old)
    group = loaded.param_groups[0]
    assert (group["maximize"], group["foreach"], group["fused"]) == (False, None, None)
    train(model, optimizer, 3, first=3)
    train(other, loaded, 3, first=3)
    same_weights(model, other)


def test_loads_a_step_that_is_a_number() -> None:
    model = network()
    optimizer = INFOS["AdaBreg"].build(model.parameters(), "l1")
    train(model, optimizer, 3)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state["step"] = state["step"].item()
    other = copy.deepcopy(model)
    loaded = INFOS["AdaBreg"].build(other.parameters(), "l1")
    loaded.load_state_dict(state_dict)
    train(model, optimizer, 3, first=3)
    train(other, loaded, 3, first=3)
    same_weights(model, other)
    assert {s["step"].item() for s in loaded.state.values()} == {6.0}


@each
def test_a_state_dict_of_other_parameters_is_refused(info: Info) -> None:
    optimizer = info.build([_param(), _param()])
    for wrong in (info.build([_param()]), info.build([{"params": [_param()]}, {"params": [_param()]}])):
        with pytest.raises(ValueError, match="parameter group"):
            optimizer.load_state_dict(wrong.state_dict())


@penalised
@each
def test_named_parameters(info: Info, penalty: str) -> None:
    model, plain = network(), network()
    named = info.build(model.named_parameters(), penalty)
    unnamed = info.build(plain.parameters(), penalty)
    names = [name for name, _ in model.named_parameters()]
    train(model, named, 4)
    train(plain, unnamed, 4)
    same_weights(model, plain)  # names change no number
    assert named.state_dict()["param_groups"][0]["param_names"] == names
    assert "param_names" not in unnamed.state_dict()["param_groups"][0]
    for source in (named, unnamed):
        for has_names in (True, False):
            target = network()
            target.load_state_dict(model.state_dict())
            prefixed = [(f"mine.{n}", p) for n, p in target.named_parameters()]
            loaded = info.build(prefixed if has_names else target.parameters(), penalty)
            loaded.load_state_dict(through_disk(source.state_dict()))
            found = loaded.state_dict()["param_groups"][0].get("param_names")
            if source is named:
                assert found == names
            else:
                assert found == ([f"mine.{n}" for n in names] if has_names else None)
            again = copy.deepcopy(model)
            train(target, loaded, 2, first=4)
            rest = info.build(again.parameters(), penalty)
            rest.load_state_dict(unnamed.state_dict())
            train(again, rest, 2, first=4)
            same_weights(target, again)


@each
def test_named_groups(info: Info) -> None:
    model = network()
    optimizer = info.build(
        [{"params": list(model[0].named_parameters())}, {"params": list(model[2].named_parameters())}]
    )
    optimizer.add_param_group({"params": [("extra", _param())]})
    assert [g["param_names"] for g in optimizer.param_groups] == [["weight", "bias"], ["weight", "bias"], ["extra"]]


# ---------------------------------------------------------------------- hooks


@pytest.fixture
def removed() -> Iterator[Callable[[Any], None]]:
    handles: list[Any] = []
    yield handles.append
    for handle in handles:
        handle.remove()


@each
def test_step_hooks(info: Info, removed: Callable[[Any], None]) -> None:
    p = _param()
    optimizer = info.build([p])
    bystander = info.build([_param()])
    p.grad = torch.ones_like(p)
    order: list[str] = []
    seen: list[Tensor] = []

    def note(name: str) -> Callable[..., None]:
        def hook(self: Any, args: Any, kwargs: Any) -> None:
            assert self is optimizer
            order.append(name)
            seen.append(p.detach().clone())

        return hook

    removed(register_optimizer_step_pre_hook(note("global before")))
    removed(register_optimizer_step_post_hook(note("global after")))
    handles = [optimizer.register_step_pre_hook(note("before")), optimizer.register_step_post_hook(note("after"))]
    optimizer.step()
    assert order == ["global before", "before", "after", "global after"]
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], p)
    assert not torch.equal(seen[1], seen[2])
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert order[4:] == ["global before", "global after"]
    assert not bystander._optimizer_step_pre_hooks


@each
def test_a_step_pre_hook_may_change_the_arguments(info: Info) -> None:
    p = _param()
    optimizer = info.build([p])
    optimizer.register_step_pre_hook(lambda self, args, kwargs: ((self, lambda: 42.0), {}))
    assert optimizer.step() == 42.0


@each
def test_state_dict_hooks(info: Info) -> None:
    optimizer = info.build([_param()])
    order: list[str] = []

    def replacing(self: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        order.append("post")
        return {**state_dict, "ours": 1}

    optimizer.register_state_dict_pre_hook(lambda self: order.append("pre"))
    optimizer.register_state_dict_pre_hook(lambda self: order.append("pre first"), prepend=True)
    optimizer.register_state_dict_post_hook(replacing)
    optimizer.register_state_dict_post_hook(lambda self, s: order.append(f"post first {'ours' in s}"), prepend=True)
    handle = optimizer.register_state_dict_post_hook(lambda self, s: order.append(f"post last {'ours' in s}"))
    assert optimizer.state_dict()["ours"] == 1
    assert order == ["pre first", "pre", "post first False", "post", "post last True"]
    handle.remove()
    optimizer.state_dict()
    assert order[5:] == ["pre first", "pre", "post first False", "post"]


@penalised
@each
def test_load_state_dict_hooks(info: Info, penalty: str) -> None:
    """They run in order, around the loading, and what the last one before it returns is what is loaded."""
    model = network()
    source = info.build(model.parameters(), penalty, lr=0.5)
    train(model, source, 2)
    saved = copy.deepcopy(source.state_dict())
    optimizer = info.build(copy.deepcopy(model).parameters(), penalty, lr=0.25)
    order: list[str] = []

    def before(name: str, factor: float) -> Callable[..., dict[str, Any]]:
        def hook(self: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            assert self.param_groups[0]["lr"] == 0.25, "nothing is loaded yet"
            order.append(name)
            changed = copy.deepcopy(state_dict)
            changed["param_groups"][0]["lr"] += factor
            for state in changed["state"].values():
                for key in ("dual", "momentum", "exp_avg"):
                    if key in state:
                        state[key] = state[key] * 2
            return changed

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(self: Any) -> None:
            assert self.param_groups[0]["lr"] == 3.5
            order.append(name)

        return hook

    optimizer.register_load_state_dict_pre_hook(before("pre", 1.0))
    optimizer.register_load_state_dict_pre_hook(before("pre first", 2.0), prepend=True)
    optimizer.register_load_state_dict_post_hook(after("post"))
    optimizer.register_load_state_dict_post_hook(after("post first"), prepend=True)
    optimizer.load_state_dict(saved)
    assert order == ["pre first", "pre", "post first", "post"]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 2
    same_tree(saved, source.state_dict())  # the caller's dict is the caller's
    for mine, theirs in zip(optimizer.state.values(), source.state.values(), strict=True):
        for key, value in theirs.items():
            if key in ("dual", "momentum", "exp_avg"):
                assert torch.equal(mine[key], value * 4), key


@penalised
@each
def test_a_post_hook_sees_the_state_as_it_will_be_used(info: Info, penalty: str) -> None:
    """torch casts state to the weight's dtype while it loads; a hook must not meet that half-way state."""
    model = network(torch.bfloat16)
    source = info.build(model.parameters(), penalty)
    train(model, source, 2)
    optimizer = info.build(copy.deepcopy(model).parameters(), penalty)
    dtypes: set[torch.dtype] = set()

    def hook(self: Any) -> None:
        dtypes.update(v.dtype for s in self.state.values() for v in s.values() if isinstance(v, Tensor))

    optimizer.register_load_state_dict_post_hook(hook)
    optimizer.load_state_dict(source.state_dict())
    assert dtypes == ({torch.float32} if info.has_state else set())


# ---------------------------------------------------------------------- copies


@penalised
@each
def test_copies_have_all_attributes_and_go_their_own_way(info: Info, penalty: str) -> None:
    model = network()
    optimizer = info.build([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}], penalty)
    train(model, optimizer, 3)
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    pairs.append(through_disk((model, optimizer), weights_only=False))
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert {"param_groups", "state", "defaults"} <= public
    before = copy.deepcopy(model)
    for other, copied in pairs:
        assert public == {name for name in vars(copied) if not name.startswith("_")}
        assert type(copied) is type(optimizer)
        same_tree(copied.state_dict()["state"], optimizer.state_dict()["state"])
        assert copied.param_groups[0]["params"][0] is other[0].weight
        train(other, copied, 3, first=3)
    same_weights(model, before)
    train(model, optimizer, 3, first=3)
    for other, copied in pairs:
        same_weights(model, other)
        same_tree(copied.state_dict()["state"], optimizer.state_dict()["state"])
        copied.add_param_group({"params": [thinned(_param())]})  # the default regulariser came along
        assert copied.param_groups[-1]["regularizer"] == optimizer.param_groups[0]["regularizer"]
    assert differs(model, before)


# ---------------------------------------------------------------------- schedulers

TABLE: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedule.LambdaLR(o, lambda k: 0.9**k),
    "MultiplicativeLR": lambda o: schedule.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: schedule.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: schedule.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: schedule.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: schedule.LinearLR(o, 0.25, 1.0, 6),
    "ExponentialLR": lambda o: schedule.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedule.PolynomialLR(o, 9, 2.0),
    "CosineAnnealingLR": lambda o: schedule.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: schedule.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: schedule.CyclicLR(o, 0.001, 0.02, 3, cycle_momentum="momentum" in o.defaults),
    "OneCycleLR": lambda o: schedule.OneCycleLR(o, 0.02, total_steps=12),
    "ReduceLROnPlateau": lambda o: schedule.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o: schedule.SequentialLR(
        o, [schedule.ConstantLR(o, 0.1, 3), schedule.ExponentialLR(o, 0.9)], [4]
    ),
    "ChainedScheduler": lambda o: schedule.ChainedScheduler(
        [schedule.LinearLR(o, 0.25, total_iters=4), schedule.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.002, anneal_epochs=5),
}


def test_the_table_of_schedulers_is_complete() -> None:
    known = {
        name
        for name, cls in vars(schedule).items()
        if isinstance(cls, type) and issubclass(cls, schedule.LRScheduler) and "LRScheduler" not in name
    }
    assert known <= set(TABLE)


def scheduled(model: nn.Module, optimizer: Any, scheduler: Any) -> list[tuple[Any, ...]]:
    trace = []
    for k in range(10):
        train(model, optimizer, 1, first=k)
        if isinstance(scheduler, schedule.ReduceLROnPlateau):
            scheduler.step(1.0)  # no progress at all
        else:
            scheduler.step()
        trace.append(tuple((g["lr"], g.get("momentum"), g.get("betas")) for g in optimizer.param_groups))
    return trace


@pairwise({"info": INFOS, "name": list(TABLE), "penalty": PENALTIES})
def test_schedulers(info: Info, name: str, penalty: str) -> None:
    """lr, momentum and betas go as those of torch's own optimizer, and so, without a regulariser, do the weights."""
    model, other = network(), network()
    groups = [
        [{"params": list(m[0].parameters())}, {"params": list(m[2].parameters()), "lr": 0.03}] for m in (model, other)
    ]
    ours, theirs = info.build(groups[0], penalty), info.twin(groups[1])
    trace = scheduled(model, ours, TABLE[name](ours))
    assert trace == scheduled(other, theirs, TABLE[name](theirs))
    assert len({step[0][0] for step in trace}) > 1, "the schedule never moved"
    if penalty == "none" and info in IDENTICAL and not (name in ("CyclicLR", "OneCycleLR") and info.name == "LinBreg"):
        same_weights(model, other)  # a cycled momentum turns plain LinBreg into the paper's rule
    assert differs(model, network())


@each
def test_a_schedule_is_obeyed_and_not_only_shown(info: Info) -> None:
    """lr 0 for a while: nothing moves; then it does."""
    p = _param()
    optimizer = info.build([p], lr=0.1)
    scheduler = schedule.LambdaLR(optimizer, lambda k: 0.0 if k < 3 else 1.0)
    start = p.detach().clone()
    moved = []
    for _ in range(5):
        p.grad = torch.ones_like(p)
        optimizer.step()
        scheduler.step()
        moved.append(not torch.equal(p, start))
    assert moved == [False, False, False, True, True]


@penalised
@each
def test_scheduler_and_optimizer_resume_together(info: Info, penalty: str) -> None:
    def fresh() -> tuple[Any, Any, Any]:
        model = network()
        optimizer = info.build(model.parameters(), penalty)
        return model, optimizer, schedule.CosineAnnealingLR(optimizer, 20)

    model, optimizer, scheduler = fresh()
    train(model, optimizer, 5, scheduler)
    saved = through_disk([x.state_dict() for x in (model, optimizer, scheduler)])
    train(model, optimizer, 5, scheduler, first=5)
    others = fresh()
    for thing, state_dict in zip(others, saved, strict=True):
        thing.load_state_dict(state_dict)
    train(others[0], others[1], 5, others[2], first=5)
    same_weights(model, others[0])
    assert others[1].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < info.base["lr"]


# ---------------------------------------------------------------------- averages and scaled gradients


@pairwise({"info": INFOS, "penalty": PENALTIES, "decay": {"swa": None, "ema": 0.75}})
def test_averaged_models(info: Info, penalty: str, decay: float | None) -> None:
    model, other = network(torch.float64), network(torch.float64)
    optimizer, undisturbed = (info.build(m.parameters(), penalty) for m in (model, other))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay) if decay else None)
    path = []
    for k in range(6):
        train(model, optimizer, 1, first=k)
        averaged.update_parameters(model)
        path.append([p.detach().clone() for p in model.parameters()])
    for i, q in enumerate(averaged.module.parameters()):
        expected = path[0][i]
        for step in path[1:]:
            expected = decay * expected + (1 - decay) * step[i] if decay else expected + step[i]
        torch.testing.assert_close(q.detach(), expected if decay else expected / 6, rtol=1e-12, atol=1e-12)
    train(other, undisturbed, 6)
    same_weights(model, other)
    again = pickle.loads(pickle.dumps(averaged.module.state_dict()))
    model.load_state_dict(again)  # and training can go on from the average
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    for state in optimizer.state.values():
        if "momentum" in state:
            state["momentum"].zero_()
    optimizer.step()
    for p, q in zip(model.parameters(), averaged.module.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-12)


@penalised
@each
def test_grad_scaler(info: Info, penalty: str) -> None:
    """Scaled and unscaled again by a power of two changes no bit; a step with an overflow does not happen."""
    model, other = network(), network()
    optimizer, plain = (info.build(m.parameters(), penalty) for m in (model, other))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for k in range(4):
        x, y = batch(k)
        optimizer.zero_grad()
        scaler.scale((model(x) - y).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    train(other, plain, 4)
    same_weights(model, other)
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, math.inf)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    same_weights(model, before)
    same_tree(optimizer.state_dict(), state)
    assert scaler.get_scale() == 512.0


# ---------------------------------------------------------------------- J = 0: the method without a regulariser

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {},
        {"weight_decay": 0.01},
        {"maximize": True, "weight_decay": 0.5},
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 0.01},
        {"momentum": 0.5, "maximize": True},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "maximize": True},
    ],
    "Adam": [
        {},
        {"weight_decay": 0.01},
        {"maximize": True},
        {"betas": (0.5, 0.99)},
        {"betas": (0.0, 0.9), "eps": 1e-3},
        {"eps": 1e-4, "weight_decay": 0.1, "maximize": True},
    ],
}
TWINS = {
    f"{ours.__name__}-{'-'.join(f'{k}={v}' for k, v in options.items())}": (ours, theirs, rule, options)
    for ours, theirs, rule, variants in (
        (tb.LinBreg, SGD, {"momentum_rule": "sgd"}, VARIANTS["SGD"]),
        (tb.ProxSGD, SGD, {}, VARIANTS["SGD"][2::3]),
        (tb.AdaBreg, ADAM_TWIN, {}, VARIANTS["Adam"]),
    )
    for options in variants
}


@pairwise({"ours,theirs,rule,options": TWINS, "foreach": PATHS, "dtype": FLOATS})
def test_without_a_regulariser_it_is_torchs_optimizer(
    ours: Any, theirs: Any, rule: dict[str, Any], options: dict[str, Any], foreach: bool, dtype: torch.dtype
) -> None:
    """The same weights, bit for bit, over 100 steps on a network, with a schedule."""
    lr = 0.002 if options.get("maximize") else 0.02
    models = [network(dtype, sparse=False), network(dtype, sparse=False)]
    optimizers = [
        ours(models[0].parameters(), lr=lr, foreach=foreach, **rule, **options),
        theirs(models[1].parameters(), lr=lr, foreach=foreach, **options),
    ]
    losses = [train(m, o, 100, schedule.CosineAnnealingLR(o, 120)) for m, o in zip(models, optimizers, strict=True)]
    same_weights(models[0], models[1])
    assert losses[0] == losses[1]
    assert math.isfinite(losses[0][-1])
    assert losses[0][-1] != losses[0][0]


@pytest.mark.parametrize("foreach", [False, True], ids=["forloop", "foreach"])
def test_with_decoupled_weight_decay_it_is_adamw(foreach: bool) -> None:
    """To rounding: torch multiplies θ by 1 − τω, and here τωθ is taken off v."""
    models = [network(torch.float64, sparse=False), network(torch.float64, sparse=False)]
    ours = tb.AdaBreg(models[0].parameters(), 0.02, weight_decay=0.3, decoupled_weight_decay=True, foreach=foreach)
    theirs = torch.optim.AdamW(models[1].parameters(), 0.02, weight_decay=0.3, foreach=foreach)
    for model, optimizer in zip(models, (ours, theirs), strict=True):
        train(model, optimizer, 100, schedule.CosineAnnealingLR(optimizer, 120))
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_regulariser_of_no_strength_is_none(dtype: torch.dtype) -> None:
    for info in INFOS.values():
        models = [network(dtype), network(dtype)]
        train(models[0], info.build(models[0].parameters()), 20)
        train(models[1], info.build(models[1].parameters(), regularizer=tb.L1(), lam=0.0), 20)
        same_weights(*models)


def test_the_papers_momentum_is_a_damped_average() -> None:
    """At the same lr it moves 1/(1−β) times less far than SGD's, and with lr/(1−β) it is SGD's."""
    models = [network(torch.float64, sparse=False), network(torch.float64, sparse=False)]
    train(models[0], tb.LinBreg(models[0].parameters(), lr=0.1, momentum=0.9), 50)
    train(models[1], SGD(models[1].parameters(), lr=0.01, momentum=0.9), 50)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_with_a_regulariser_it_is_not_torchs_optimizer() -> None:
    """So that the identities above say something."""
    for info in INFOS.values():
        models = [network(), network()]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(models[0], info.build(models[0].parameters(), "l1"), 20)
        train(models[1], info.build(models[1].parameters()), 20)
        assert differs(*models)
        assert tb.density(models[0]) < tb.density(models[1])
