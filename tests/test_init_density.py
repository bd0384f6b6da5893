"""The sparse start, what is counted, and which parameters are regularised."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import torch_bregman as tb
from torch_bregman.models import build


@pytest.fixture(autouse=True)
def _seed() -> None:
    """What torch draws when a layer is made does not depend on the tests that ran before."""
    torch.manual_seed(0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(12 * 16, 20), nn.LayerNorm(20), nn.Linear(20, 10),
    )  # fmt: skip


def odd_convolutions() -> nn.Sequential:
    """One and three dimensions, transposed, depthwise, 1×1."""
    return nn.Sequential(
        nn.Conv1d(3, 5, 4), nn.Conv3d(2, 3, 2), nn.ConvTranspose2d(6, 4, 3), nn.Conv2d(6, 6, 3, groups=6),
        nn.Conv2d(5, 7, 1), nn.Conv2d(4, 6, 3, groups=2),
    )  # fmt: skip


class Tied(nn.Module):
    """An embedding and two Linear layers on one matrix, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.twin = nn.Linear(8, 12)
        self.head.weight = self.embedding.weight
        self.twin.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.twin(self.body(self.embedding(x)).relu())


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights, found here by hand: a tied one once, one that is also an embedding not."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, kinds) and id(module.weight) not in embeddings:
            found.setdefault(id(module.weight), (f"{name}.weight", module.weight))
        if isinstance(module, nn.MultiheadAttention):
            found[id(module.in_proj_weight)] = (f"{name}.in_proj_weight", module.in_proj_weight)
    return dict(found.values())


def naive_count(tensor: Tensor) -> int:
    return sum(x != 0 for x in tensor.detach().flatten().tolist())


# ---------------------------------------------------------------------- sparse_init_: how many


@pytest.mark.parametrize("density", [0.001, 0.01, 0.37, 0.5, 1.0, 1])
@pytest.mark.parametrize("make", [lambda: mlp(50, 30, 10), convnet, odd_convolutions], ids=["mlp", "convnet", "odd"])
def test_every_layer_has_exactly_what_was_asked(make, density):
    model = make()
    assert tb.sparse_init_(model, density, generator=seeded()) is model
    for name, weight in weights(model).items():
        assert naive_count(weight) == max(1, round(density * weight.numel())), name
        assert weight.isfinite().all()


@pytest.mark.parametrize("density", [0.02, 0.25, 0.5, 0.75])
@pytest.mark.parametrize(
    ("groups", "dims"),
    [("rows", 1), ("columns", 0), ("kernels", (2, 3)), ("filters", (1, 2, 3)), ("channels", (0, 2, 3))],
)
def test_groups_are_drawn_without_replacement(groups, dims, density):
    """Asked 50 % of the kernels, got 50 %; with replacement it would be 39 %."""
    linear = groups in ("rows", "columns")
    model = nn.Sequential(nn.Linear(40, 30) if linear else nn.Conv2d(20, 30, 3))
    tb.sparse_init_(model, density, groups=groups, generator=seeded())
    alive = (model[0].weight != 0).double().mean(dim=dims)
    assert set(alive.flatten().tolist()) <= {0.0, 1.0}  # whole groups
    assert int(alive.sum()) == max(1, round(density * alive.numel()))


def test_the_masks_are_spread_evenly():
    """Over many draws every entry is alive equally often: the mask is uniform."""
    model, gen = nn.Sequential(nn.Linear(10, 10)), seeded()
    often = torch.zeros(10, 10)
    for _ in range(600):
        tb.sparse_init_(model, 0.3, generator=gen)
        often += model[0].weight.detach() != 0
    sigma = math.sqrt(600 * 0.3 * 0.7)
    assert float((often - 180).abs().max()) < 4.5 * sigma  # of 100 entries: once in 1500 runs, and the seed is fixed
    chi2 = float(((often - 180) ** 2).sum()) / (600 * 0.3 * 0.7)
    assert 50 < chi2 < 160


def test_layers_that_do_not_fit_are_drawn_entry_by_entry():
    model = convnet()
    tb.sparse_init_(model, 0.5, groups="kernels", generator=seeded())
    for weight in weights(model).values():
        if weight.dim() == 4:
            alive = (weight != 0).double().mean(dim=(2, 3))
            assert set(alive.flatten().tolist()) == {0.0, 1.0}
            assert int(alive.sum()) == round(0.5 * alive.numel())
        else:
            assert naive_count(weight) == round(0.5 * weight.numel())
            assert int((weight != 0).any(1).sum()) == len(weight)


def test_index_groups():
    index = torch.arange(12 * 8).view(12, 8) // 4 % 12
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 5))
    tb.sparse_init_(model, 0.5, groups=index, generator=seeded())
    shares = torch.stack([(model[0].weight[index == g] != 0).double().mean() for g in range(12)])
    assert set(shares.tolist()) == {0.0, 1.0}
    assert int(shares.sum()) == 6
    assert naive_count(model[1].weight) == 30  # does not fit, so entry by entry


def test_index_groups_that_broadcast():
    """GroupL1 takes such an index, so the start must: here pairs of rows."""
    index = torch.arange(12).unsqueeze(1) // 2
    model = nn.Sequential(nn.Linear(8, 12))
    tb.GroupL1(index).check(model[0].weight.shape)
    tb.sparse_init_(model, 0.5, groups=index, generator=seeded())
    pairs = (model[0].weight != 0).view(6, 16).double().mean(1)
    assert sorted(pairs.tolist()) == [0.0] * 3 + [1.0] * 3


def test_index_groups_with_unused_numbers():
    """Half of the groups that exist; a number that no entry has is no group."""
    index = (torch.arange(12).unsqueeze(1) // 2 * 10).expand(12, 8).clone()  # 0, 10, …, 50
    for seed in range(5):
        model = nn.Sequential(nn.Linear(8, 12))
        tb.sparse_init_(model, 0.5, groups=index, generator=seeded(seed))
        assert int((model[0].weight != 0).all(1).sum()) == 6


# ---------------------------------------------------------------------- sparse_init_: how large


def spread(density: float, nonlinearity: str, correct: bool, width: int = 1000, depth: int = 10) -> float:
    """Mean square of the last layer's pre-activations over that of the first, geometric mean of four draws."""
    act = {"relu": torch.relu, "tanh": torch.tanh}[nonlinearity]
    logs = []
    for seed in range(4):
        layer = nn.Linear(width, width, bias=False)
        gen = seeded(seed)
        x = torch.randn(64, width, generator=gen)
        first = last = 0.0
        for k in range(depth):
            tb.sparse_init_(layer, density, generator=gen, nonlinearity=nonlinearity)
            weight = layer.weight.detach() * (1.0 if correct else math.sqrt(density))
            z = x @ weight.T
            first, last = (float(z.square().mean()) if k == 0 else first), float(z.square().mean())
            x = act(z)
        logs.append(math.log(last / first))
    return math.exp(sum(logs) / len(logs))


@pytest.mark.parametrize("density", [0.01, 0.05, 1.0])
def test_relu_signals_keep_their_variance(density):
    """Through ten layers. E[z²] stays exactly, and one draw at 1 % of 1000 inputs scatters by about 0.2 in the
    logarithm: a factor of two is seven standard deviations of the mean of four. Without 1/√r it is r⁹: 1e-18 at 1 %.
    """
    assert 0.5 < spread(density, "relu", correct=True) < 2.0
    if density < 1:
        assert spread(density, "relu", correct=False) < 1e-8


def test_tanh_signals_keep_their_variance():
    """Saturation makes tanh forgiving: at every density the variance settles close to that of dense layers."""
    dense = spread(1.0, "tanh", correct=True)
    assert 0.7 < spread(0.05, "tanh", correct=True) / dense < 1.4
    assert spread(0.05, "tanh", correct=False) / dense < 1e-4


@pytest.mark.parametrize("density", [0.05, 1.0])
def test_signals_keep_their_variance_in_convolutions(density):
    """Through six layers. One draw scatters by 0.4 in the logarithm, the mean of twelve by 0.12: a factor of two is
    five standard deviations. Without 1/√r it is r⁵: 3e-7 at 5 %.
    """
    conv = nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular", bias=False)
    logs = {True: [], False: []}
    for seed, correct in itertools.product(range(12), logs if density < 1 else (True,)):
        gen = seeded(seed)
        x = torch.randn(2, 64, 8, 8, generator=gen)
        squares = []
        for _ in range(6):
            tb.sparse_init_(conv, density, generator=gen)
            z = conv(x).detach() * (1.0 if correct else math.sqrt(density))
            squares.append(float(z.square().mean()))
            x = z.relu()
        logs[correct].append(math.log(squares[-1] / squares[0]))
    assert 0.5 < math.exp(sum(logs[True]) / 12) < 2.0
    if density < 1:
        assert math.exp(sum(logs[False]) / 12) < 1e-5


def test_groups_keep_the_variance_too():
    """Half of the rows at twice the variance: the mean square of the outputs is that of a dense start."""
    x = torch.randn(400, 300, generator=seeded(1))
    for groups in (None, "rows", "columns"):
        layer = nn.Linear(300, 200, bias=False)
        tb.sparse_init_(layer, 0.25, groups=groups, generator=seeded())
        assert float((x @ layer.weight.detach().T).square().mean()) == pytest.approx(2.0, rel=0.1), groups


def test_the_variance_of_the_weights():
    for density in (0.1, 1.0):
        for nonlinearity, gain in (("relu", math.sqrt(2)), ("linear", 1.0), ("tanh", 5 / 3)):
            layer = nn.Conv2d(40, 60, 3)
            tb.sparse_init_(layer, density, generator=seeded(), nonlinearity=nonlinearity)
            alive = layer.weight.detach()[layer.weight != 0].double()
            wanted = gain**2 / (40 * 9) / density
            error = 5 * math.sqrt(2 / alive.numel())  # five standard deviations of a variance
            assert float(alive.square().mean()) == pytest.approx(wanted, rel=error)
            assert abs(float(alive.mean())) < 5 * math.sqrt(wanted / alive.numel())


def test_a_transposed_convolution_counts_its_own_inputs():
    """Its weight is [in, out, …]: an output sums over `in`·kernel terms, not over `out`·kernel."""
    gen = seeded()
    layer = nn.ConvTranspose2d(8, 64, 3, bias=False)
    tb.sparse_init_(layer, 0.5, generator=gen)
    x = torch.randn(32, 8, 16, 16, generator=gen)
    inner = layer(x).detach()[:, :, 2:-2, 2:-2]  # where all nine taps land
    assert float(inner.square().mean()) == pytest.approx(2.0, rel=0.2)


def live_inputs(module: nn.Module) -> list[int]:
    """Of every unit, by pushing a one through each weight: its own output tells which unit it belongs to."""
    weight, linear = module.weight.detach(), isinstance(module, nn.Linear)
    outputs, inputs = weight.shape if linear else (module.out_channels, module.in_channels)
    found: list[int] = []
    for at in weight.nonzero().tolist():
        single = copy.deepcopy(module)
        single.bias = None
        nn.init.zeros_(single.weight)
        single.weight.data[tuple(at)] = 1.0
        out = single(torch.ones(1, inputs, *[9] * (weight.dim() - 2)))
        found.append(int(out.reshape(outputs, -1).sum(1).nonzero()))
    return [found.count(unit) for unit in range(outputs)]


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(7, 9), nn.Conv1d(3, 5, 4), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 4, 3),
        nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv2d(5, 4, 1),
    ],
    ids=str,
)  # fmt: skip
def test_every_unit_has_the_least_number_of_inputs(module, least):
    drawn = tb.sparse_init_(copy.deepcopy(module), 0.05, generator=seeded())
    more = tb.sparse_init_(copy.deepcopy(module), 0.05, generator=seeded(), min_inputs=least)
    assert live_inputs(more) == [max(n, least) for n in live_inputs(drawn)]
    assert ((more.weight != 0) | (drawn.weight == 0)).all()  # to those that are drawn anyway


@pytest.mark.parametrize("least", [1, 9, 10])
def test_every_filter_has_the_least_number_of_inputs_in_whole_kernels(least):
    layer = tb.sparse_init_(nn.Conv2d(20, 30, 3), 0.02, "kernels", generator=seeded(), min_inputs=least)
    alive = (layer.weight != 0).flatten(2).double().mean(2)
    assert set(alive.flatten().tolist()) == {0.0, 1.0}
    assert int(alive.sum(1).min()) == (1 if least <= 9 else 2)
    assert int(alive.sum()) < 30 * (1 if least <= 9 else 2) + 12  # 12 are drawn


@pytest.mark.parametrize("groups", ["rows", "columns", "filters", "channels"])
def test_other_groups_are_left_as_they_are_drawn(groups):
    module = nn.Linear(40, 30) if groups in ("rows", "columns") else nn.Conv2d(20, 30, 3)
    drawn = [
        tb.sparse_init_(copy.deepcopy(module), 0.1, groups, generator=seeded(), min_inputs=least) for least in (0, 5)
    ]
    assert torch.equal(drawn[0].weight, drawn[1].weight)


def test_a_unit_has_no_more_inputs_than_weights():
    layer = tb.sparse_init_(nn.Linear(3, 5), 0.2, generator=seeded(), min_inputs=4)
    assert (layer.weight != 0).all()


def test_a_unit_without_inputs_before_a_norm_never_wakes():
    """What min_inputs is for."""
    for least in (0, 1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30, bias=False), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 3))
        tb.sparse_init_(model, 0.03, generator=seeded(), min_inputs=least)
        asleep = (model[0].weight == 0).all(1)
        optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1(), lam=0.1), lr=0.02)
        for _ in range(30):
            x = torch.randn(64, 20)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
            optimizer.step()
        alive = (model[0].weight != 0).any(1)
        assert bool(asleep.any()) == (least == 0)
        assert not alive[asleep].any()
        assert tb.density(model) > 0.1


@pytest.mark.parametrize("least", [-1, 1.0, True, None, "1"])
def test_a_bad_number_of_inputs_is_named(least):
    with pytest.raises(ValueError, match=rf"`min_inputs`: {least!r}; expected a whole number of at least 0"):
        tb.sparse_init_(nn.Linear(3, 5), min_inputs=least)


# ---------------------------------------------------------------------- sparse_init_: biases, norms, storage


def test_biases():
    """Positive for ReLU, both signs for odd activations, never zero, within s/√fan_in."""
    for nonlinearity in ("relu", "leaky_relu", "tanh", "sigmoid", "linear"):
        for scale in (1.0, 0.3):
            layer = nn.Linear(25, 400)
            tb.sparse_init_(layer, 0.01, generator=seeded(), nonlinearity=nonlinearity, bias_scale=scale)
            bias, bound = layer.bias.detach(), scale / 5
            assert (bias != 0).all()
            assert float(bias.abs().max()) <= bound
            assert float(bias.abs().mean()) == pytest.approx(bound / 2, rel=0.15)
            if nonlinearity in ("relu", "leaky_relu"):
                assert (bias > 0).all()
            else:
                assert 150 < int((bias > 0).sum()) < 250


def test_every_bias_is_redrawn_and_positive():
    for model in (mlp(20, 30, 10), convnet(), odd_convolutions()):
        for module in model:
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        tb.sparse_init_(model, 0.1, generator=seeded())
        for module in model:
            if isinstance(module, nn.Linear) or "Conv" in type(module).__name__:
                assert module.bias is None or (module.bias > 0).all()
        for name, value in model.state_dict().items():
            if "running" in name or "num_batches" in name:
                assert torch.equal(value, before[name])


def test_norms_and_everything_else_stay():
    model = nn.Sequential(convnet(), nn.Embedding(5, 4), nn.GroupNorm(1, 3), nn.PReLU())
    gen = seeded(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm | nn.Embedding | nn.PReLU):
            for parameter in module.parameters():
                nn.init.normal_(parameter, generator=gen)
    touched = {*weights(model), "0.0.bias", "0.6.bias", "0.8.bias"}
    before = copy.deepcopy(dict(model.named_parameters()))
    tb.sparse_init_(model, 0.2, generator=seeded())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in touched), name


def test_a_residual_network_without_conv_biases():
    model = build("resnet18", (3, 32, 32), 10)
    tb.sparse_init_(model, 0.01, generator=seeded())
    for name, weight in weights(model).items():
        assert int(torch.count_nonzero(weight)) == max(1, round(0.01 * weight.numel())), name
    assert tb.density(model) == pytest.approx(0.01, abs=1e-5)
    assert (model.head.bias > 0).all()
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    out = model(torch.randn(2, 3, 32, 32, generator=seeded()))
    assert out.isfinite().all()


def test_tied_weights():
    model = Tied()
    tb.sparse_init_(model, 0.25, generator=seeded())
    assert model.head.weight is model.embedding.weight
    assert naive_count(model.head.weight) == 96  # a token's row must not die
    assert naive_count(model.body.weight) == 16
    tb.sparse_init_(model, 0.25, generator=seeded(), weights=["head"])
    assert naive_count(model.head.weight) == round(0.25 * 96)
    assert model.twin.bias.any()


def test_both_layers_of_a_tied_weight_get_their_bias():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    for layer in model:
        nn.init.zeros_(layer.bias)
    tb.sparse_init_(model, 0.25, generator=seeded())
    assert (model[0].bias > 0).all()
    assert (model[1].bias > 0).all()


def test_the_storage_of_the_weights_stays():
    """In place, channels last too, and the same values whatever the memory format and dtype."""
    model, last = convnet(), convnet().to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    pointers = [p.data_ptr() for p in last.parameters()]
    strides = [p.stride() for p in last.parameters()]
    tb.sparse_init_(plain, 0.3, generator=seeded())
    tb.sparse_init_(last, 0.3, generator=seeded())
    assert [p.data_ptr() for p in last.parameters()] == pointers
    assert [p.stride() for p in last.parameters()] == strides
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)
    double = tb.sparse_init_(convnet().double(), 0.3, generator=seeded())
    for name, weight in weights(plain).items():
        assert torch.equal(weight, weights(last)[name])
        assert torch.equal(weight.double(), weights(double)[name])
    half = tb.sparse_init_(convnet().bfloat16(), 0.3, generator=seeded())
    assert half[0].weight.dtype == torch.bfloat16
    assert naive_count(half[3].weight) == round(0.3 * 12 * 8 * 9)


def test_no_negative_zeros():
    layer = tb.sparse_init_(nn.Linear(50, 50), 0.1, generator=seeded())
    zeros = layer.weight[layer.weight == 0]
    assert not torch.signbit(zeros).any()


def test_a_single_layer_is_a_model():
    layer = nn.Linear(10, 10)
    tb.sparse_init_(layer, 0.1)
    assert naive_count(layer.weight) == 10
    assert tb.density(layer) == 0.1
    assert tb.sparsity_report(layer).weights == (10, 100)


# ---------------------------------------------------------------------- sparse_init_: randomness and mistakes


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_generator_reproduces_and_leaves_the_global_state():
    models = [convnet() for _ in range(4)]
    for norm in (1, 7):
        for model in models:
            nn.init.ones_(model[norm].weight)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    tb.sparse_init_(models[0], 0.2, generator=seeded(5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    tb.sparse_init_(models[1], 0.2, generator=seeded(5))
    tb.sparse_init_(models[2], 0.2, generator=seeded(6))
    assert same(models[0], models[1])
    assert not same(models[0], models[2])
    gen = seeded(5)
    tb.sparse_init_(models[1], 0.2, generator=gen)
    tb.sparse_init_(models[3], 0.2, generator=gen)
    assert same(models[0], models[1])
    assert not same(models[1], models[3])  # a generator moves on


def test_without_a_generator_the_global_seed_decides():
    models = [mlp(10, 8, 4) for _ in range(3)]
    for model, seed in zip(models, (7, 7, 8), strict=True):
        torch.manual_seed(seed)
        tb.sparse_init_(model, 0.2)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_gradients_are_not_recorded():
    model = tb.sparse_init_(mlp(10, 8, 4), 0.2)
    assert all(p.requires_grad and p.grad_fn is None and p.is_leaf for p in model.parameters())


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.01, 5, 50, math.nan, math.inf, "0.1", None, True])
def test_density_must_be_a_share(density):
    model = mlp(10, 8, 4)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="density"):
        tb.sparse_init_(model, density)
    assert same(model, before)


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf, "1"])
def test_bias_scale_is_a_finite_number_that_is_not_negative(scale):
    """A negative one would draw negative biases for ReLU: neurons that start dead; NaN would be written."""
    model = mlp(10, 8, 4)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="bias_scale"):
        tb.sparse_init_(model, 0.1, bias_scale=scale)
    assert same(model, before)


def test_an_unknown_nonlinearity():
    model = mlp(10, 8, 4)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="swoosh"):
        tb.sparse_init_(model, 0.1, nonlinearity="swoosh")
    assert same(model, before)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_weights_among_others():
    """A Linear with no inputs has no weight to count; its neighbours are counted all the same."""
    model = nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 3))
    assert tb.density(model) == 1.0
    assert tb.sparsity_report(model).weights == (12, 12)
    tb.sparse_init_(model, 0.5, generator=seeded())
    assert naive_count(model[1].weight) == 6


def test_percent_are_recognised():
    with pytest.raises(ValueError, match=r"0\.05"):
        tb.sparse_init_(mlp(10, 8, 4), 5)


def test_groups_that_do_not_exist_or_fit():
    with pytest.raises(ValueError, match="'kernel'") as error:
        tb.sparse_init_(convnet(), 0.1, groups="kernel")
    assert "'kernels'" in str(error.value)
    model = mlp(10, 8, 4)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="kernels"):
        tb.sparse_init_(model, 0.1, groups="kernels")
    with pytest.raises(ValueError, match="fits none"):
        tb.sparse_init_(model, 0.1, groups=torch.zeros(3, 3, dtype=torch.long))
    assert same(model, before)


@pytest.mark.parametrize("index", [torch.zeros(4, 8), torch.full((4, 8), -1)], ids=["float", "negative"])
def test_index_groups_are_checked_like_those_of_a_regulariser(index):
    with pytest.raises(ValueError, match="groups"):
        tb.sparse_init_(mlp(10, 8, 4), 0.1, groups=index)


def test_a_model_without_layers():
    for model in (nn.Sequential(), nn.ReLU(), nn.BatchNorm2d(3), nn.Embedding(4, 4)):
        with pytest.raises(ValueError, match="no Linear or Conv"):
            tb.sparse_init_(model, 0.1)
        with pytest.raises(ValueError, match="no Linear or Conv"):
            tb.density(model)


def test_a_report_without_layers():
    with pytest.raises(ValueError, match="no Linear or Conv"):
        tb.sparsity_report(nn.Sequential(nn.ReLU()))


# ---------------------------------------------------------------------- density and the report


MODELS = {
    "mlp": lambda: mlp(50, 30, 10),
    "convnet": convnet,
    "odd": odd_convolutions,
    "tied": Tied,
    "resnet18": lambda: build("resnet18", (3, 32, 32), 10),
}


@pytest.mark.parametrize("name", MODELS)
def test_density_is_nonzero_over_all(name):
    model = MODELS[name]()
    count = naive_count if name != "resnet18" else (lambda w: int((w != 0).sum()))
    dense = sum(w.numel() for w in weights(model).values())
    if name == "resnet18":
        assert dense == 11_164_352
    tb.sparse_init_(model, 0.1, generator=seeded())
    for weight in weights(model).values():
        weight.data.view(-1)[:3] = torch.tensor([0.0, -0.0, 1e-30])  # exact zeros are zeros, tiny weights are not
    alive = sum(count(w) for w in weights(model).values())
    assert tb.density(model) == alive / dense
    report = tb.sparsity_report(model)
    assert report.weights == (alive, dense)
    assert report.density == alive / dense
    assert [layer.name for layer in report.layers] == list(weights(model))
    for layer, weight in zip(report.layers, weights(model).values(), strict=True):
        assert layer.weights == (count(weight), weight.numel())
        assert layer.shape == tuple(weight.shape)
        assert layer.density == count(weight) / weight.numel()


def test_density_of_extremes():
    model = mlp(5, 4, 3)
    assert tb.density(model) == 1.0
    for weight in weights(model).values():
        nn.init.zeros_(weight)
    assert tb.density(model) == 0.0
    assert tb.sparsity_report(model).weights == (0, 32)
    frozen = mlp(5, 4, 3).requires_grad_(False)
    assert tb.density(frozen) == 1.0


@pytest.mark.parametrize("name", ["mlp", "convnet", "tied"])
def test_every_denominator_of_the_report(name):
    model = MODELS[name]()
    tb.sparse_init_(model, 0.05, generator=seeded())
    report = tb.sparsity_report(model, rank=True)
    neurons, filters, kernels = [0, 0], [0, 0], [0, 0]
    for layer, weight in zip(report.layers, weights(model).values(), strict=True):
        matrix = weight.detach()
        rows = sum(bool((matrix[i] != 0).any()) for i in range(len(matrix)))
        columns = sum(bool((matrix[:, j] != 0).any()) for j in range(matrix.shape[1]))
        assert layer.outputs == (rows, matrix.shape[0])
        assert layer.inputs == (columns, matrix.shape[1])
        total = neurons if matrix.dim() == 2 else filters
        total[0], total[1] = total[0] + rows, total[1] + matrix.shape[0]
        if matrix.dim() == 2:
            assert layer.kernels is None
        else:
            alive = sum(bool((k != 0).any()) for row in matrix for k in row)
            assert layer.kernels == (alive, matrix.shape[0] * matrix.shape[1])
            kernels[0], kernels[1] = kernels[0] + alive, kernels[1] + layer.kernels[1]
        flat = matrix.flatten(1)
        assert layer.rank == (int(torch.linalg.matrix_rank(flat)), min(flat.shape))
    assert report.neurons == tuple(neurons)
    assert report.filters == tuple(filters)
    assert report.kernels == tuple(kernels)
    assert all(layer.rank is None for layer in tb.sparsity_report(model).layers)


def test_the_report_by_hand():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Linear(4, 5))
    for weight in weights(model).values():
        nn.init.zeros_(weight)
    model[0].weight.data[0, 0, 0, 1] = 1.0
    model[0].weight.data[2, 0] = 2.0
    model[1].weight.data[1] = torch.tensor([1.0, 0.0, 2.0, 0.0])
    conv, linear = tb.sparsity_report(model, rank=True).layers
    assert (conv.weights, conv.outputs, conv.inputs, conv.kernels) == ((5, 24), (2, 3), (1, 2), (2, 6))
    assert (linear.weights, linear.outputs, linear.inputs, linear.kernels) == ((2, 20), (1, 5), (2, 4), None)
    assert (conv.rank, linear.rank) == ((2, 3), (1, 4))


def test_outputs_and_inputs_of_a_transposed_convolution():
    """Its weight is [in, out, …]; `outputs` are filters and `inputs` channels all the same."""
    layer = nn.ConvTranspose2d(6, 4, 3)
    nn.init.zeros_(layer.weight)
    layer.weight.data[0, 0] = 1.0
    layer.weight.data[1, 0] = 1.0
    (found,) = tb.sparsity_report(layer).layers
    assert found.outputs == (1, 4)
    assert found.inputs == (2, 6)
    assert found.kernels == (2, 24)


def test_inputs_of_a_grouped_convolution():
    """A depthwise layer on 6 channels has 6 inputs, though its weight is [6, 1, 3, 3]."""
    depthwise = nn.Conv2d(6, 6, 3, groups=6)
    nn.init.zeros_(depthwise.weight)
    depthwise.weight.data[:2] = 1.0
    (found,) = tb.sparsity_report(depthwise).layers
    assert found.outputs == (2, 6)
    assert found.inputs == (2, 6)
    grouped = nn.Conv2d(4, 6, 3, groups=2)
    nn.init.zeros_(grouped.weight)
    grouped.weight.data[0, 1] = 1.0  # channel 1
    grouped.weight.data[3, 1] = 1.0  # of the second group: channel 3
    (found,) = tb.sparsity_report(grouped).layers
    assert found.inputs == (2, 4)
    assert found.kernels == (2, 12)


def test_the_report_prints_as_a_table():
    model = tb.sparse_init_(convnet(), 0.1, generator=seeded())
    report = tb.sparsity_report(model, rank=True)
    lines = str(report).splitlines()
    head = lines[0].split()
    assert head == ["layer", "shape", "weights", "density", "outputs", "inputs", "kernels", "rank"]
    assert len(lines) == 1 + 4 + 2
    for line, layer in zip(lines[1:5], report.layers, strict=True):
        assert line.split()[0] == layer.name
        assert f"{layer.weights[0]:,}/{layer.weights[1]:,}" in line
        assert f"{layer.density:.3%}" in line
        assert f"{layer.outputs[0]}/{layer.outputs[1]}" in line
        assert f"{layer.inputs[0]}/{layer.inputs[1]}" in line
    assert lines[5].startswith("all")
    kept, size = report.weights
    assert f"{kept:,}/{size:,}" in lines[5]
    assert f"{report.kernels[0]:,}/{report.kernels[1]:,}" in lines[5]
    end = lines[0].index("weights") + len("weights")  # the numbers stand in columns
    assert {line[end] for line in lines[:6]} == {" "}
    assert all(line[end - 1].isdigit() for line in lines[1:6])
    assert "biases and norms not counted" in lines[6]
    assert "kernels" not in str(tb.sparsity_report(mlp(5, 4, 3))).splitlines()[0]


@pytest.mark.parametrize("measure", [tb.density, tb.sparsity_report])
def test_one_synchronisation(measure, monkeypatch):
    """Each .item(), .tolist(), bool() or int() of a tensor waits for the device: once per call, not once per layer."""
    model, calls = convnet(), []

    def counting(name):
        original = getattr(Tensor, name)

        def wrapped(self, *args):
            calls.append(name)
            return original(self, *args)

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu"):
            patch.setattr(Tensor, name, counting(name))
        assert int(torch.tensor(1)) == 1  # the counting works
        assert calls
        calls.clear()
        measure(model)
    assert len(calls) == 1


def test_measuring_changes_nothing():
    model = tb.sparse_init_(convnet(), 0.1, generator=seeded())
    before = copy.deepcopy(model.state_dict())
    training = model.training
    tb.density(model)
    str(tb.sparsity_report(model, rank=True))
    assert model.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------- param_groups


class Net(nn.Module):
    """Named parts of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 6)
        self.conv1 = nn.Conv1d(6, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.conv2 = nn.Conv1d(8, 8, 1, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc1 = nn.Linear(8, 7)
        self.fc2 = nn.Linear(7, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.norm(self.conv1(self.tokens(x).transpose(1, 2))).relu()).transpose(1, 2)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.fc2(self.fc1(x.mean(1)).relu()) * self.scale


WEIGHTS = [
    "conv1.weight", "conv2.weight", "attention.in_proj_weight", "attention.out_proj.weight", "fc1.weight", "fc2.weight",
]  # fmt: skip


def by_name(model: nn.Module, groups: list[dict]) -> dict[str, dict]:
    """parameter name → its group; every parameter exactly once."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found
            found[name] = group
    assert set(found) == set(names.values())
    return found


def regularised(model: nn.Module, groups: list[dict]) -> set[str]:
    return {name for name, group in by_name(model, groups).items() if group["regularizer"] is not None}


def test_weights_are_regularised_and_nothing_else():
    model = Net()
    groups = tb.param_groups(model, tb.L1(), lam=0.3)
    assert regularised(model, groups) == set(WEIGHTS)
    for name, group in by_name(model, groups).items():
        assert group["lam"] == (0.3 if name in WEIGHTS else 0.0)
        assert group["counted"] is (name in WEIGHTS)
    assert groups[0]["regularizer"] == tb.L1()
    assert len(groups) == 2
    assert regularised(model, tb.param_groups(model)) == set(WEIGHTS)  # ℓ1 is the default


def test_no_regulariser_still_counts_the_weights():
    model = Net()
    groups = tb.param_groups(model, None)
    assert regularised(model, groups) == set()
    assert {name for name, group in by_name(model, groups).items() if group["counted"]} == set(WEIGHTS)


@pytest.mark.parametrize("make", [convnet, odd_convolutions, Tied, lambda: build("resnet18", (3, 8, 8), 10)])
def test_every_parameter_once_in_other_models(make):
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if make is Tied else "error")  # most of it is an embedding
        groups = tb.param_groups(model, tb.L1(), lam=0.1)
    by_name(model, groups)
    counted = {id(p) for group in groups if group["counted"] for p in group["params"]}
    assert counted == {id(w) for w in weights(model).values()}


def test_embeddings_are_not_regularised_and_tied_weights_come_once():
    plain = Net()
    assert by_name(plain, tb.param_groups(plain, tb.L1(), lam=1.0))["tokens.weight"]["regularizer"] is None
    tied = Tied()
    with pytest.warns(UserWarning, match="64 of 160 matrix entries are weights"):
        groups = tb.param_groups(tied, tb.L1(), lam=1.0)
    flat = [id(p) for group in groups for p in group["params"]]
    assert flat.count(id(tied.head.weight)) == 1
    assert len(flat) == len(set(flat)) == len(list(tied.parameters()))
    assert regularised(tied, groups) == {"body.weight"}  # it is the weight of a Linear too, but a row is a token's


@pytest.mark.parametrize("key", ["head", "head.weight", "twin", "embedding", "embedding.weight", nn.Embedding])
def test_a_tied_weight_is_reached_by_any_of_its_names(key):
    """named_parameters() knows it as embedding.weight, a person as the head; density reports it as head.weight."""
    model = Tied()
    assert [layer.name for layer in tb.sparsity_report(model).layers] == ["body.weight"]
    groups = tb.param_groups(model, {key: tb.L1(), "*": tb.L1()}, lam=1.0)
    assert regularised(model, groups) == {"embedding.weight", "body.weight"}
    assert [layer.name for layer in tb.sparsity_report(model).layers] == ["body.weight", "head.weight"]
    groups = tb.param_groups(model, {key: None, "*": tb.L1()}, lam=1.0)
    assert regularised(model, groups) == {"body.weight"}
    assert regularised(model, tb.param_groups(model, tb.L1(), lam=1.0, weights={key: None})) == {"body.weight"}


@pytest.mark.parametrize("key", ["*", "head*", "*.weight*", nn.Linear])
def test_a_tied_embedding_is_not_meant_by_what_means_all_heads(key):
    model = Tied()
    with pytest.warns(UserWarning, match=r"embedding\.weight \(an embedding, also head\.weight; 96\)"):
        groups = tb.param_groups(model, {key: tb.L1()}, lam=1.0)
    assert "embedding.weight" not in regularised(model, groups)


def test_by_module_type():
    model = Net()
    rows = tb.GroupL1("rows")
    groups = tb.param_groups(
        model, {nn.Linear: rows, nn.Conv1d: tb.GroupL1("kernels"), nn.MultiheadAttention: rows}, lam=0.2
    )
    found = by_name(model, groups)
    assert regularised(model, groups) == set(WEIGHTS)
    assert found["fc1.weight"]["regularizer"].groups == "rows"
    assert found["attention.out_proj.weight"]["regularizer"].groups == "rows"
    assert found["conv1.weight"]["regularizer"].groups == "kernels"
    assert found["fc1.bias"]["regularizer"] is None
    only = tb.param_groups(model, {nn.Conv1d: tb.L1()}, lam=0.2)
    assert regularised(model, only) == {"conv1.weight", "conv2.weight"}
    assert by_name(model, only)["fc1.weight"]["counted"]


def test_by_pattern_and_the_first_match_wins():
    model = Net()
    groups = tb.param_groups(model, {"fc2": None, "fc*": tb.NonNegativeL1(), "*": tb.L1()}, lam=0.2)
    found = by_name(model, groups)
    assert found["fc2.weight"]["regularizer"] is None
    assert found["fc2.weight"]["lam"] == 0.0
    assert found["fc1.weight"]["regularizer"] == tb.NonNegativeL1()
    assert found["conv1.weight"]["regularizer"] == tb.L1()
    assert regularised(model, groups) == set(WEIGHTS) - {"fc2.weight"}
    turned = tb.param_groups(model, {"*": tb.L1(), "fc2": None}, lam=0.2)
    assert regularised(model, turned) == set(WEIGHTS)
    mixed = tb.param_groups(model, {"fc1.weight": None, nn.Linear: tb.L1()}, lam=0.2)
    assert regularised(model, mixed) == {"fc2.weight", "attention.out_proj.weight"}


@pytest.mark.parametrize("pattern", ["fc*", "fc1", "fc1.*", "fc?", "*", "fc[12]*", "fc1.weight"])
def test_patterns_leave_biases_and_norms_alone(pattern):
    model = Net()
    assert regularised(model, tb.param_groups(model, {pattern: tb.L1()}, lam=0.2)) <= set(WEIGHTS)
    assert "fc1.weight" in regularised(model, tb.param_groups(model, {pattern: tb.L1()}, lam=0.2))


def test_other_parameters_are_reached_by_name():
    model = Net()
    for pattern, reached in (
        ("*.in_proj_weight", "attention.in_proj_weight"),
        ("attention.in_proj_weight", "attention.in_proj_weight"),
        ("scale", "scale"),
        ("fc1.bias", "fc1.bias"),
        ("tokens.weight", "tokens.weight"),
    ):
        groups = tb.param_groups(model, {pattern: tb.L1()}, lam=0.2)
        assert regularised(model, groups) == {reached}
        group = by_name(model, groups)[reached]
        assert group["lam"] == 0.2
        assert group["counted"] is (dict(model.named_parameters())[reached].dim() > 1)  # density counts matrices


@pytest.mark.parametrize(
    ("pattern", "nearest"), [("fc3", "fc"), ("conv1.wieght", "conv1.weight"), ("atention.*", "attention"), ("FC1*", "")]
)
@pytest.mark.parametrize("which", ["regularizer", "lam"])
def test_an_unknown_pattern_names_the_nearest(which, pattern, nearest):
    with pytest.raises(ValueError, match="matches no parameter") as error:
        tb.param_groups(Net(), **{which: {pattern: tb.L1() if which == "regularizer" else 0.1}})
    assert repr(pattern) in str(error.value)
    assert nearest in str(error.value)


def test_a_regulariser_that_does_not_fit():
    with pytest.raises(ValueError, match="rows") as error:
        tb.param_groups(Net(), tb.GroupL1("rows"), lam=0.1)
    text = str(error.value)
    assert "conv1.weight" in text
    assert "(8, 6, 3)" in text
    assert "nn.Linear: tb.L1()" in text  # the remedy
    with pytest.raises(ValueError, match=r"scale.*NuclearNorm|NuclearNorm.*scale"):
        tb.param_groups(Net(), {"scale": tb.NuclearNorm()})


def test_mistakes():
    with pytest.raises(ValueError, match="Regularizer"):
        tb.param_groups(Net(), {"fc1": 0.1})
    with pytest.raises(ValueError, match="Regularizer"):
        tb.param_groups(Net(), tb.L1)
    with pytest.raises(ValueError, match="key"):
        tb.param_groups(Net(), {3: tb.L1()})
    with pytest.raises(ValueError, match="no parameters"):
        tb.param_groups(nn.ReLU())


def test_lam_by_layer():
    model = Net()
    groups = tb.param_groups(model, tb.L1(), lam={"fc2": 0.0, nn.Linear: 0.5, "*": 0.1})
    found = by_name(model, groups)
    wanted = {"fc2.weight": 0.0, "fc1.weight": 0.5, "attention.out_proj.weight": 0.5, "conv1.weight": 0.1}
    for name, lam in wanted.items():
        assert found[name]["lam"] == lam, name
        assert found[name]["regularizer"] == tb.L1()
    assert found["fc1.bias"]["lam"] == 0.0
    assert len(groups) == 4
    partly = by_name(model, tb.param_groups(model, tb.L1(), lam={nn.Linear: 0.5}))
    assert partly["conv1.weight"]["lam"] == 0.0


def test_lam_reaches_whatever_is_regularised():
    """A mapping for λ that says "*" means all that has a regulariser, however that was reached."""
    model = Net()
    groups = tb.param_groups(model, {"*.in_proj_weight": tb.L1(), "*": tb.L1()}, lam={"fc2": 0.5, "*": 0.1})
    assert by_name(model, groups)["attention.in_proj_weight"]["lam"] == 0.1


def test_lam_as_a_tensor():
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    lam = torch.tensor(0.2)
    groups = tb.param_groups(model, tb.L1(), lam=lam)
    assert len(groups) == 2
    assert groups[0]["lam"] is lam
    per_row = torch.rand(3, 1)
    found = by_name(model, tb.param_groups(model, tb.L1(), lam={"0": per_row, "1": 0.1}))
    assert found["0.weight"]["lam"] is per_row
    assert found["1.weight"]["lam"] == 0.1


def test_options_pass_through():
    groups = tb.param_groups(Net(), tb.L1(), lam=0.1, lr=0.7, delta=2.0, momentum=0.5)
    for group in groups:
        assert (group["lr"], group["delta"], group["momentum"]) == (0.7, 2.0, 0.5)
    optimizer = tb.LinBreg(groups, lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.7] * len(groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0] * len(groups)


@pytest.mark.parametrize("make", [tb.LinBreg, tb.AdaBreg, tb.ProxSGD])
@pytest.mark.parametrize("mapping", [False, True])
def test_with_every_optimizer(make, mapping):
    """Three steps of each: dead weights may wake, biases and norms move, λ large enough keeps all weights at zero."""
    model = Net()
    tb.sparse_init_(model, 0.3, generator=seeded())
    chosen = {nn.Linear: tb.GroupL1("rows"), nn.Conv1d: tb.SparseGroupL1("filters"), "*.in_proj_weight": tb.L1()}
    groups = tb.param_groups(model, chosen if mapping else tb.L1(), lam=0.05)
    before = copy.deepcopy(dict(model.named_parameters()))
    x = torch.randint(0, 9, (16, 5), generator=seeded(1))

    def steps(optimizer) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()  # a sum may diverge
            optimizer.step()

    steps(make(groups, lr=1e-3))
    assert not torch.equal(model.fc2.bias, before["fc2.bias"])
    assert not torch.equal(model.norm.bias, before["norm.bias"])
    assert not torch.equal(model.fc2.weight, before["fc2.weight"])
    assert all(p.isfinite().all() for p in model.parameters())

    for weight in weights(model).values():
        nn.init.zeros_(weight)
    steps(make(tb.param_groups(model, tb.L1(), lam=1e6), lr=1e-3))
    assert tb.density(model) == 0.0
    assert model.fc2.bias.any()
    steps(make(tb.param_groups(model, tb.L1(), lam=0.0), lr=1e-3))
    assert tb.density(model) > 0.0
