"""A run between two steps: all that it is made of, and what has come of it so far."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import AUGMENTATIONS, Batches, Dataset, Split
from ..models import build
from ..network.kinds.conv import gains_by_channels_last
from ..rivals import Lasso
from .denoising import Denoising, start_at_mean
from .device import pick_threads
from .errors import RunError
from .evaluation import evaluate
from .graphs import Replayed
from .ranks import Processes
from .recipe import (
    DENSE,
    RIVALS,
    Recipe,
    asked_density,
    make_control,
    make_levels,
    make_optimizer,
    make_rival,
    make_schedule,
)
from .ssim import similarity_on
from .start import start_sparse
from .trial import dtype_of, least_samples, try_out


class Training:
    """The network that `recipe` asks for, the objects that train it on `data`, and how far they have come.

    `data`: on `device`. `ranks`: the processes that train together. All that the rest of the run depends on is in
    `state_dict`: a run that loads it goes on bit for bit as the one that was saved.
    """

    def __init__(self, recipe: Recipe, data: Dataset, device: torch.device, ranks: Processes) -> None:
        self.recipe, self.device, self.ranks = recipe, device, ranks
        self.order = torch.Generator().manual_seed(recipe.seed)
        torch.manual_seed(recipe.seed)
        self.model = model = build(recipe.model, data.shape, len(data.classes))
        self.data = data = data.to(device, dtype_of(model))
        self.denoising = Denoising.of(model, data, recipe)
        self.asked = asked_density(recipe, model)
        if recipe.optimizer not in (*DENSE, *RIVALS, "proxsgd"):
            start_sparse(recipe, model)
        if self.denoising:
            start_at_mean(model, self.denoising.clean(data.train.x))
        model.to(device)
        try_out(recipe.model, model, data.train.x[:2], len(data.classes))
        self.batches = self._batches()
        self.steps_per_epoch = len(self.batches)
        total_steps = recipe.epochs * self.steps_per_epoch
        self.layout = fastest_layout(model, ranks)
        if self.layout:
            model.to(**self.layout)
        if device.type == "cpu":
            threads = pick_threads(model, data.train.x[: recipe.batch_size], ranks.local_size)
            torch.set_num_threads(recipe.threads or threads)
        network = ranks.wrap(model, data.train.x[:2])  # `model` has the weights
        ranks.own_random_numbers(recipe.seed)

        self.optimizer = make_optimizer(recipe, model)
        self.control = make_control(recipe, self.optimizer, model, total_steps)
        self.schedule = make_schedule(recipe, self.optimizer, total_steps)
        self.levels = make_levels(recipe, self.optimizer, network)
        self.rival = make_rival(recipe, self.optimizer, model, total_steps)
        self.call: Callable[[Tensor], Tensor] = network
        if recipe.cuda_graphs and device.type == "cuda" and ranks.size == 1:
            self.call = Replayed(model, recipe.batch_size)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.mixed: Callable[[], Any] = nullcontext
        if recipe.precision != "32":
            dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float16
            self.mixed = lambda: torch.autocast(device.type, dtype)
        self.similarity = similarity_on(data) if self.denoising else None

        self.noise = torch.Generator(device).manual_seed(recipe.seed)

        self.rows: list[dict[str, Any]] = []  # of metrics.jsonl
        self.best: dict[str, Any] = {}  # epoch, score and measures of the network that is kept
        self.epoch, self.batch = 1, 0  # the one that goes on, and how many of its batches are behind
        self.losses = torch.full((self.steps_per_epoch,), math.nan, device=device)  # of this epoch
        self._averaged = 0  # of the losses: how many are the means over the ranks
        self._order_of_epoch = self.order.get_state()  # when it began
        self._spent, self._began = 0.0, time.perf_counter()

    def _batches(self) -> Batches:
        """The samples in random order; what is too little for a batch norm joins the batch before it."""
        recipe, samples = self.recipe, self.data.train
        one = least_samples(self.model, samples.x[:2])
        least = one * self.ranks.size if one > 1 else 1  # a rank without samples may take another's
        if min(recipe.batch_size, len(samples)) < least:
            raise ValueError(
                f"Invalid `batch_size`: {recipe.batch_size}, of {len(samples)} samples to train on; expected at least "
                f"{least}, for a batch norm of {recipe.model!r} needs two samples in each process."
            )
        if recipe.augment != "none" and len(self.data.shape) != 3:
            raise ValueError(
                f"Invalid `augment`: {recipe.augment!r} is for images [C, H, W]; the samples have shape "
                f"{list(self.data.shape)}."
            )
        augment = None if recipe.augment == "none" else AUGMENTATIONS[recipe.augment]
        return Batches(samples, recipe.batch_size, generator=self.order, augment=augment, least=least)

    # ------------------------------------------------------------------ how far it has come

    @property
    def parts(self) -> dict[str, Any]:
        """The objects with a state of their own, by the names that they have in a checkpoint."""
        return {
            "model": self.model, "optimizer": self.optimizer, "schedule": self.schedule, "control": self.control,
            "levels": self.levels, "rival": self.rival, "scaler": self.scaler,
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on: tensors and plain values."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "recipe": asdict(self.recipe),
            "epoch": self.epoch, "batch": self.batch, "losses": self.losses, "rows": self.rows, "best": self.best,
            "seconds": self.seconds,
            **{name: part.state_dict() if part is not None else {} for name, part in self.parts.items()},
            "order": self._order_of_epoch, "noise": self.noise.get_state(), "random": torch.get_rng_state(),
            "cuda": cuda,
        }  # fmt: skip

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, of a run with the same recipe."""
        if len(saved["losses"]) != self.steps_per_epoch:
            raise RunError(
                f"The run has {len(saved['losses'])} steps per epoch, and here it would have {self.steps_per_epoch}, "
                "because of its batch norms; go on with as many processes as it began with."
            )
        for name, part in self.parts.items():
            if part is not None:
                part.load_state_dict(saved[name])
        self.epoch, self.batch, self._spent = saved["epoch"], saved["batch"], saved["seconds"]
        self.rows, self.best = saved["rows"], saved["best"]
        self.losses.copy_(saved["losses"])
        self._averaged = self.batch
        self._order_of_epoch = saved["order"]
        self.order.set_state(saved["order"])
        self.noise.set_state(saved["noise"])
        if saved["random"] is not None:  # as for a rank that was not there
            torch.set_rng_state(saved["random"])
        if saved["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda"], self.device)

    def start_clock(self) -> None:
        """Count the `seconds` from here on."""
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """How long it has trained, without what lay between a stop and going on."""
        return self._spent + time.perf_counter() - self._began

    @property
    def steps(self) -> int:
        """How many steps are behind."""
        return (self.epoch - 1) * self.steps_per_epoch + self.batch

    # ------------------------------------------------------------------ a step

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step on the batch `x` with the labels `y`, of which each rank takes its part."""
        if self.layout:
            x = x.contiguous(**self.layout)
        self.optimizer.zero_grad()
        with self.mixed():
            loss = self.ranks.weigh(self._loss(x, y), len(x))
        whole = loss + self.rival.penalty() if isinstance(self.rival, Lasso) else loss
        self.scaler.scale(whole).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.control is not None:
            self.control.step()
        if self.levels is not None:
            self.levels.step()
        if self.rival is not None:
            self.rival.step()
        if self.recipe.schedule != "plateau":
            self.schedule.step()
        self.losses[self.batch] = loss.detach()
        self.batch += 1

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        if self.denoising:
            noisy, clean = self.ranks.part(self.denoising.noisy(x, self.noise), self.denoising.clean(x))
            return F.mse_loss(self.call(noisy), clean)
        x, y = self.ranks.part(x, y)
        return F.cross_entropy(self.call(x), y)

    def average_losses(self) -> Tensor:
        """The losses of this epoch so far, means over the ranks: all of them call this."""
        self.ranks.average_(self.losses[self._averaged : self.batch])
        self._averaged = self.batch
        return self.losses[: self.batch]

    def next_epoch(self) -> None:
        """The epoch is over: its losses are forgotten, and the samples come in another order."""
        self.epoch, self.batch, self._averaged = self.epoch + 1, 0, 0
        self.losses[:] = math.nan
        self._order_of_epoch = self.order.get_state()

    # ------------------------------------------------------------------ how good it is

    def scores(self, split: Split, images: int) -> dict[str, float]:
        """`evaluate` on `split`, of images the structural similarity of the first so many."""
        return evaluate(self.model, split, self.denoising, self.mixed, self.layout, self.ranks, self.similarity, images)


def fastest_layout(model: nn.Module, ranks: Processes) -> dict[str, Any]:
    """Channels last for convolutions, where that is safe; else what the tensors have."""
    return {"memory_format": torch.channels_last} if gains_by_channels_last(model) and ranks.strategy != "fsdp" else {}
