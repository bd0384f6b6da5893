"""What a run is made of: the options of the command line, the recipe file, and the objects they name."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..choices import choose
from ..control import TargetDensity
from ..data import AUGMENTATIONS
from ..density import check_density
from ..distributed import is_sharded
from ..files import write_atomically
from ..layers import param_groups, weight_layers
from ..models import MODELS
from ..multilevel import Multilevel
from ..optim import AdaBreg, BregmanOptimizer, LinBreg, ProxSGD, RegularizedOptimizer
from ..optim.options import check_number
from ..regularizers import GROUPS, L1, GroupL1, NonNegativeL1, NuclearNorm, Regularizer, SparseGroupL1
from ..rivals import SET, GradualMagnitudePruning, Lasso, RigL, Rival
from .errors import writing

#: optimizer → its default lr
OPTIMIZERS = {
    "adabreg": 2e-2, "linbreg": 5e-1, "proxsgd": 1e-1, "adam": 1e-3, "sgd": 1e-1,
    "gmp": 1e-3, "set": 1e-3, "rigl": 1e-3, "lasso": 1e-3,
}  # fmt: skip
AUGMENT = {"mnist": "shift", "fashion-mnist": "shift", "cifar10": "crop-flip"}
DENOISERS = ("autoencoder", "skipencoder")  # models that are not trained on shifted images
DENSE = ("adam", "sgd")
RIVALS = ("gmp", "set", "rigl", "lasso")  # Adam, with a rival of `rivals` that makes the network sparse
REGULARIZERS = ("l1", "nonnegative-l1", "group-l1", "sparse-group-l1", "nuclear")
SCHEDULES = ("cosine", "constant", "plateau")
PRECISIONS = ("32", "bf16", "fp16")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a run."""

    dataset: str = "digits"
    """digits, mnist, fashion-mnist, cifar10, or a path: an .npz with your arrays, or a folder of images."""

    model: str = "auto"
    """mlp, convnet, resnet18, autoencoder, skipencoder, densenet, or package.module:function of your own, called with
    (shape, classes); one that says task = "denoise" gives the pixels before noise and normalisation. auto: resnet18 for
    cifar10, mlp for the rest."""

    density: float | None = None
    """Share of the Linear and Conv weights to keep, 0.05 for 5 %. The run ends exactly there. [0.05 unless --lam]"""

    conv_density: float | None = None
    """Share of the Conv weights to keep; --density is then that of the Linear weights. [--density is of all weights]"""

    lam: float | None = None
    """A fixed λ instead of a density; with --density, the λ to start from."""

    optimizer: str = "adabreg"
    """adabreg, linbreg, proxsgd; a dense adam, sgd; or Adam with a rival: gmp (gradual magnitude pruning), set, rigl,
    lasso (with a cut at the end)."""

    lr: float = None  # type: ignore[assignment]  # filled, as are the next ones
    """Step size τ. [adabreg 0.02, linbreg 0.5, proxsgd 0.1, adam and the rivals 0.001, sgd 0.1]"""

    momentum: float = 0.0
    """For linbreg, proxsgd and sgd, by the rule of torch.optim.SGD."""

    delta: float = 1.0
    """δ of the elastic net: scales the weights, never the support."""

    eps: float = None  # type: ignore[assignment]
    """ε of adabreg and adam. The larger one keeps weights with tiny gradients out. [adabreg 1e-4, adam 1e-8]"""

    weight_decay: float = 0.0
    """Added to the gradient, times the weight."""

    decoupled_weight_decay: bool = False
    """For adabreg, adam and the rivals: each step shrinks every weight by lr · weight_decay instead, as AdamW does."""

    regularizer: str = "l1"
    """l1, nonnegative-l1, group-l1, sparse-group-l1, nuclear."""

    groups: str = "auto"
    """For the group regularisers: rows or columns of Linear, kernels, filters or channels of Conv weights. auto: rows
    of Linear and kernels of Conv. Layers of the other kind get l1."""

    control: str = "feedback"
    """How the density is reached: feedback (λ follows slowly) or exact (in every step)."""

    multilevel: bool = False
    """Train on the live weights alone most of the time: sparse products where they are faster on this machine, or a
    smaller dense network where whole units are dead. What is not faster stays dense."""

    coarse_steps: int | None = None
    """With --multilevel: steps on the live weights between fine ones. [4 at first, 19 in the end, where that is
    faster]"""

    fine_steps: int | None = None
    """With --multilevel: steps with the gradient of all weights in a row. [1]"""

    margin: float | None = None
    """With --multilevel: weights near the threshold that are trained along, per live one. [1, with --coarse-steps 0]"""

    boost: float | None = None
    """With --multilevel: factor on the fine steps of weights that are zero. [1]"""

    initial_density: float = 0.01
    """Share of each layer that is alive at the start; less where a smaller density is asked for."""

    epochs: int = None  # type: ignore[assignment]
    """Passes over the training data. [digits 100, else 30]"""

    batch_size: int = 128
    """Samples per step."""

    schedule: str = "cosine"
    """cosine to zero, constant, or plateau (the paper's: lr halved when the validation loss stalls)."""

    augment: str = "auto"
    """none, shift (by up to a pixel either way), crop-flip (by up to four, and mirrored). auto: shift for mnist and
    fashion-mnist, crop-flip for cifar10, none for the rest."""

    noise: float = 0.05
    """autoencoder, skipencoder: standard deviation of the noise that is added to the pixels, which lie in [0, 1]."""

    limit: int | None = None
    """Use only so many training samples, for a quick look."""

    seed: int = 0
    """Of the weights and of the order of the data."""

    threads: int = 0
    """CPU threads. 0: all cores, or one for a network so small that threads would wait for each other."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU where there is one."""

    precision: str = "32"
    """32, or mixed: bf16, fp16 (CUDA)."""

    cuda_graphs: bool = False
    """With one process on a GPU: record the passes over a batch once and replay them, which more than halves the time
    of ResNet-18 on small images; for networks that do the same whatever the data are."""

    def filled(self) -> Recipe:
        """With a value for everything that was left open, so that the file of a run says all."""
        own: dict[str, Any] = {}
        if self.model == "auto":
            own["model"] = "resnet18" if self.dataset == "cifar10" else "mlp"
        if self.augment == "auto":
            denoises = own.get("model", self.model) in DENOISERS
            own["augment"] = "none" if denoises else AUGMENT.get(self.dataset, "none")
        if self.density is None and self.lam is None and self.optimizer not in DENSE:
            own["density"] = 0.05
        if self.lam is None and self.optimizer == "proxsgd":
            own["lam"] = 1e-3  # without a dual there is nothing to find it from
        if self.lam is None and self.optimizer == "lasso":
            own["lam"] = 1e-3
        if self.lr is None:
            own["lr"] = OPTIMIZERS[self.optimizer]
        if self.eps is None:
            own["eps"] = 1e-4 if self.optimizer == "adabreg" else 1e-8
        if self.epochs is None:
            own["epochs"] = 100 if self.dataset == "digits" else 30
        return replace(self, **own)

    def check(self) -> Recipe:
        """The recipe, filled; or a ValueError that names the option, its value and what was expected."""
        choose("optimizer", self.optimizer, OPTIMIZERS)
        return self.filled()._checked()

    def _checked(self) -> Recipe:
        if ":" not in self.model:  # before any data are downloaded
            choose("model", self.model, MODELS)
        choose("regularizer", self.regularizer, REGULARIZERS)
        choose("groups", self.groups, ("auto", *GROUPS))
        choose("control", self.control, ("feedback", "exact"))
        choose("schedule", self.schedule, SCHEDULES)
        choose("precision", self.precision, PRECISIONS)
        choose("augment", self.augment, ("auto", *AUGMENTATIONS))
        if self.density is not None:
            check_density(self.density)
            if self.optimizer in DENSE:
                raise ValueError(f"Invalid `density`: {self.density}; {self.optimizer} trains dense, use adabreg.")
            if self.regularizer == "nuclear":
                raise ValueError("Invalid `density`: the nuclear norm makes low rank, not zeros; give `lam` instead.")
        if self.conv_density is not None:
            check_density(self.conv_density, name="conv_density")
            if self.density is None:
                raise ValueError(
                    f"Invalid `conv_density`: {self.conv_density}; it needs `density` for the Linear weights."
                )
            if self.optimizer in RIVALS:
                raise ValueError(
                    f"Invalid `conv_density`: {self.conv_density}; {self.optimizer} has one density for all weights."
                )
        if self.optimizer in RIVALS:
            self._check_rival()
        if self.multilevel and self.cuda_graphs:
            raise ValueError("Invalid `cuda_graphs`: True; multilevel training exchanges the network to be recorded.")
        if self.multilevel and self.optimizer in (*DENSE, *RIVALS, "proxsgd"):
            raise ValueError(f"Invalid `multilevel`: True; {self.optimizer} has no dual, use adabreg or linbreg.")
        check_density(self.initial_density, name="initial_density", one_allowed=True)
        for name, low in (("coarse_steps", 0), ("fine_steps", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < low):
                raise ValueError(f"Invalid `{name}`: {value!r}; expected a whole number of at least {low}.")
        if self.margin is not None:
            check_number("margin", self.margin)
        if self.boost is not None:
            check_number("boost", self.boost, strict=True)
        for name in ("lam", "lr", "eps", "weight_decay", "noise"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        if self.decoupled_weight_decay and self.optimizer in ("linbreg", "proxsgd", "sgd"):
            raise ValueError(
                f"Invalid `decoupled_weight_decay`: True; {self.optimizer} does not scale gradients one by "
                "one, so give `weight_decay` alone."
            )
        check_number("momentum", self.momentum, high=1.0)
        check_number("delta", self.delta, strict=True)
        if not isinstance(self.threads, int) or self.threads < 0:
            raise ValueError(f"Invalid `threads`: {self.threads!r}; expected a whole number, 0 for the default.")
        if not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"Invalid `seed`: {self.seed!r}; expected a whole number of 64 bits.")
        for name in ("epochs", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"Invalid `{name}`: {value!r}; expected a whole number of at least 1.")
        return self

    def _check_rival(self) -> None:
        if self.density is None:
            raise ValueError(f"Invalid `density`: None; {self.optimizer} has no other way to say how sparse it gets.")
        if self.lam is not None and self.optimizer != "lasso":
            raise ValueError(f"Invalid `lam`: {self.lam!r}; {self.optimizer} has no λ, give `density` alone.")
        if self.regularizer != "l1":
            raise ValueError(
                f"Invalid `regularizer`: {self.regularizer!r}; {self.optimizer} leaves single weights, use adabreg."
            )

    def twin(self) -> Recipe:
        """The dense twin: the same network and data, trained with Adam."""
        own = {"optimizer": "adam", "momentum": 0.0, "multilevel": False}
        own |= dict.fromkeys(
            ["lr", "eps", "density", "conv_density", "lam", "coarse_steps", "fine_steps", "margin", "boost"]
        )
        return Recipe(**{**asdict(self), **own}).check()

    @staticmethod
    def read(path: Path) -> Recipe:
        """The recipe in a TOML file; ValueError where it is none."""
        try:
            values = tomllib.loads(path.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"Cannot read the recipe {path}: {error}.") from None
        known = [f.name for f in fields(Recipe)]
        for name in values:
            choose("recipe option", name, known)
        return Recipe(**values).check()

    def write(self, path: Path) -> None:
        """As TOML, whole or not at all."""
        import tomli_w

        values = {name: value for name, value in asdict(self).items() if value is not None}
        with writing(path):
            write_atomically(path, tomli_w.dumps(values).encode())


def make_regularizer(recipe: Recipe) -> dict[Any, Regularizer | None]:
    """The regulariser of each kind of layer."""
    kinds = ["*"] if recipe.conv_density is None else [nn.Linear, "*"]  # a λ for each
    if recipe.regularizer == "l1":
        return {kind: L1() for kind in kinds}
    if recipe.regularizer == "nonnegative-l1":
        return {kind: NonNegativeL1() for kind in kinds}
    if recipe.regularizer == "nuclear":
        return {"*": NuclearNorm()}
    make = GroupL1 if recipe.regularizer == "group-l1" else SparseGroupL1
    linear, conv = linear_and_conv_groups(recipe)
    return {nn.Linear: make(linear) if linear else L1(), "*": make(conv) if conv else L1()}


def linear_and_conv_groups(recipe: Recipe) -> tuple[str | None, str | None]:
    """The groups of Linear and of Conv weights, None for single entries."""
    if recipe.regularizer not in ("group-l1", "sparse-group-l1"):
        return None, None
    if recipe.groups == "auto":
        return "rows", "kernels"
    return (recipe.groups, None) if recipe.groups in ("rows", "columns") else (None, recipe.groups)


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the recipe names, on the weights of `model`."""
    lr = recipe.lr if recipe.lr is not None else OPTIMIZERS[recipe.optimizer]
    on_gpu = all(p.is_cuda and not is_sharded(p) for p in model.parameters())
    if recipe.optimizer == "adam" or recipe.optimizer in RIVALS:
        adam = torch.optim.AdamW if recipe.decoupled_weight_decay else torch.optim.Adam
        return adam(model.parameters(), lr, eps=recipe.eps, weight_decay=recipe.weight_decay, fused=on_gpu or None)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr, recipe.momentum, weight_decay=recipe.weight_decay, fused=on_gpu or None
        )
    # What a model asks for beside its Linear and Conv weights, as the scalar skips of models/skip.py.
    penalties: dict[str, tuple[Regularizer, float]] = getattr(model, "penalties", {})
    groups = param_groups(
        model,
        {pattern: regularizer for pattern, (regularizer, _) in penalties.items()} | make_regularizer(recipe),
        {pattern: lam for pattern, (_, lam) in penalties.items()} | {"*": recipe.lam or 0.0},
        weights=dict.fromkeys(penalties),  # they have a λ of their own, and no density counts them
    )
    if recipe.optimizer == "adabreg":
        return AdaBreg(
            groups, lr, eps=recipe.eps, delta=recipe.delta, weight_decay=recipe.weight_decay,
            decoupled_weight_decay=recipe.decoupled_weight_decay,
        )  # fmt: skip
    if recipe.optimizer == "linbreg":
        return LinBreg(
            groups, lr, delta=recipe.delta, momentum=recipe.momentum, momentum_rule="sgd",
            weight_decay=recipe.weight_decay,
        )  # fmt: skip
    return ProxSGD(groups, lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def make_levels(recipe: Recipe, optimizer: torch.optim.Optimizer, model: nn.Module) -> Multilevel | None:
    """Fine and coarse steps, where they were asked for."""
    if not recipe.multilevel or not isinstance(optimizer, BregmanOptimizer):
        return None
    return Multilevel(model, optimizer, recipe.coarse_steps, recipe.fine_steps, recipe.boost, margin=recipe.margin)


def densities(recipe: Recipe, model: nn.Module) -> dict[torch.Tensor, float]:
    """The density asked for of each Linear and Conv weight; empty where none was."""
    if recipe.density is None:
        return {}
    layers = list(weight_layers(model))
    if recipe.conv_density is None:
        return {layer.weight: recipe.density for layer in layers}
    if len({layer.weight.dim() == 2 for layer in layers}) < 2:
        raise ValueError(
            f"Invalid `conv_density`: {recipe.conv_density}; {recipe.model} has not both Linear and Conv layers, "
            "use `density` alone."
        )
    return {layer.weight: recipe.density if layer.weight.dim() == 2 else recipe.conv_density for layer in layers}


def asked_density(recipe: Recipe, model: nn.Module) -> float | None:
    """The share of all Linear and Conv weights that was asked for."""
    if recipe.conv_density is None:
        return recipe.density
    wanted = densities(recipe, model)
    return sum(p.numel() * density for p, density in wanted.items()) / sum(p.numel() for p in wanted)


def make_control(
    recipe: Recipe, optimizer: torch.optim.Optimizer, model: nn.Module, total_steps: int
) -> TargetDensity | None:
    """The controller, where a density was asked for."""
    if recipe.density is None or not isinstance(optimizer, RegularizedOptimizer):
        return None
    density: float | list[float | None] = recipe.density
    if recipe.conv_density is not None:
        wanted = densities(recipe, model)
        kinds = [{wanted[p] for p in group["params"] if p in wanted} for group in optimizer.param_groups]
        density = [kind.pop() if len(kind) == 1 else None for kind in kinds]
    return TargetDensity(optimizer, density, recipe.control, total_steps, model=model)


def make_rival(recipe: Recipe, optimizer: torch.optim.Optimizer, model: nn.Module, total_steps: int) -> Rival | None:
    """What makes the network sparse where the optimizer does not, after every step of it."""
    if recipe.optimizer not in RIVALS or recipe.density is None:
        return None
    if recipe.optimizer == "gmp":
        return GradualMagnitudePruning(model, recipe.density, total_steps)
    if recipe.optimizer == "lasso":
        return Lasso(model, recipe.density, total_steps, lam=recipe.lam or 0.0)
    kind = SET if recipe.optimizer == "set" else RigL
    generator = torch.Generator().manual_seed(recipe.seed)
    return kind(model, recipe.density, total_steps, optimizer, generator=generator)


def make_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """A scheduler of torch, stepped after every step, or for "plateau" after every epoch."""
    schedulers = torch.optim.lr_scheduler
    if recipe.schedule == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, total_steps)
    if recipe.schedule == "plateau":
        return schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=3)
    return schedulers.ConstantLR(optimizer, factor=1.0, total_iters=0)
