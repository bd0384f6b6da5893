"""One run, from the data to the report. Reads top to bottom."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..data import load
from .checkpoints import Checkpoints, checkpoints_of
from .device import pick_device
from .display import Display
from .errors import RunError, Stopped
from .finite import check_losses, check_weights
from .measures import end_row, epoch_row, uncounted, work
from .metrics import Metrics
from .ranks import ONE_PROCESS, Processes, StatusChecks
from .recipe import Recipe
from .signals import stop_signals
from .training import Training
from .weights import keep_patterns, load_model, save_model

SAVE_EVERY = 5.0  # seconds between checkpoints, or more:
SAVE_SHARE = 0.05  # they take no more than this share of the time, however large the network
LOOK_EVERY = 0.25  # seconds between looks at the loss, each of which waits for the device
SSIM_IMAGES = 1000  # of the validation data in every epoch; of the test data all


def fit(
    recipe: Recipe, run: Path, *, data_root: Path | None = None, quiet: bool = False, title: str = "",
    brief: bool = False, ranks: Processes = ONE_PROCESS,
) -> dict[str, Any]:  # fmt: skip
    """Train what `recipe` says in the folder `run`, going on from a checkpoint there; returns its last metrics row.

    `brief`: show the last epoch alone, as of a dense twin.
    `ranks`: the processes that train together, in which case all of them call this; see `ranks.start`.

    Raises RunError for what a person can act on, Stopped after Ctrl-C or SIGTERM.
    """
    run.mkdir(parents=True, exist_ok=True)
    device = pick_device(ranks.device_name(recipe.device))
    if device.type == "cpu":
        # Averages of gradients that have become zero decay through the subnormal numbers, on which a CPU is up to a
        # hundred times slower.
        torch.set_flush_denormal(True)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True  # a resumed run is the same run

    training = Training(
        recipe, ranks.in_turn(lambda: load(recipe.dataset, data_root, limit=recipe.limit)), device, ranks
    )
    model, data, steps_per_epoch = training.model, training.data, training.steps_per_epoch

    with Display(
        recipe.epochs, steps_per_epoch, asked=training.asked, quiet=quiet, title=title, silent=not ranks.first,
        brief=brief,
    ) as display, checkpoints_of(run, display.message, ranks) as checkpoints:  # fmt: skip
        if (saved := checkpoints.load(model, training.optimizer)) is not None:
            check_same_recipe(recipe, saved["recipe"], checkpoints.path)
            training.load_state_dict(saved)
            for row in training.rows[-12:]:
                display.epoch(row)
            display.message(f"Resumed {run} at epoch {training.epoch}, step {training.batch} of {steps_per_epoch}.")
        elif not brief:
            for text in filter(None, (data.note, uncounted(model))):
                display.message(text)
        if training.levels and not kernels.available():
            display.message("Without the extra 'fast' only dead units make --multilevel faster.")
        elif training.levels and device.type == "cpu" and not kernels.compiled_before("csr"):
            display.message("The first sparse steps compile their kernels: some seconds, once on this machine.")
        display.start(training.epoch - 1)
        training.start_clock()
        saves = Saves(training, checkpoints)
        checks = StatusChecks(ranks, LOOK_EVERY)
        metrics = Metrics(run, training.rows, silent=not ranks.first)

        with stop_signals(patient=ranks.size > 1) as stopping:
            if not training.rows:
                scores = training.scores(data.validation, SSIM_IMAGES)
                training.rows.append(epoch_row(training, 0, None, scores, 0.0, 0.0))
                metrics.add(training.rows[0])
                keep_patterns(run, "start", model, ranks)

            while training.epoch <= recipe.epochs:
                model.train()
                began, first = time.perf_counter(), training.batch
                for x, y in training.batches.epoch(skip=first):
                    training.step(x, y)
                    display.advance(len(x))
                    if checks.due(stopping()):
                        stop, late = checks.agree(stopping(), saves.due)
                        display.loss(finite_losses(training, checkpoints.last)[-1].item())
                        checkpoints.look()
                        if stop or late:
                            saves.save(urgent=stop)
                        if stop:
                            checkpoints.wait()
                            where = f"epoch {training.epoch}, step {training.batch} of {steps_per_epoch}"
                            raise Stopped(f"Stopped at {where}; saved.")

                train_loss = finite_losses(training, checkpoints.last).mean().item()
                seconds = time.perf_counter() - began
                scores = training.scores(data.validation, SSIM_IMAGES)
                rate = recipe.batch_size * (training.batch - first) / max(seconds, 1e-9)
                row = epoch_row(training, training.epoch, train_loss, scores, seconds, rate) | work(training.levels)
                training.rows.append(row)
                metrics.add(row)
                display.epoch(row)
                if recipe.schedule == "plateau":
                    training.schedule.step(scores["val_loss"])
                score = scores.get("val_accuracy", -scores["val_loss"])
                # A model off the density that was asked for is never the best one; of equals the later is the nearer.
                eligible = training.asked is None or row["on_target"]
                if eligible and score >= training.best.get("score", -math.inf):
                    training.best = {"epoch": training.epoch, "score": score, **scores}
                    save_model(run / "best.safetensors", model, ranks)
                if training.epoch == (recipe.epochs + 1) // 2:
                    keep_patterns(run, "middle", model, ranks)
                training.next_epoch()
                over = training.epoch > recipe.epochs
                if any(ranks.any(over or saves.due)):
                    saves.save(urgent=over)

    seconds = training.seconds
    save_model(run / "last.safetensors", model, ranks)
    if training.best:
        load_model(run / "best.safetensors", model, ranks)
    keep_patterns(run, "end", model, ranks)
    # The one time the test data are touched.
    end = end_row(training, training.scores(data.test, len(data.test)), seconds)
    metrics.add(end)
    metrics.close()
    return end


def check_same_recipe(recipe: Recipe, saved: dict[str, Any], path: Path) -> None:
    """RunError, naming the options, where the checkpoint at `path` was made with another recipe."""
    if saved != asdict(recipe):
        changed = [name for name, value in asdict(recipe).items() if saved.get(name) != value]
        raise RunError(f"The checkpoint {path} was made with other options: {', '.join(changed)}.")


class Saves:
    """When and how a run is saved: every SAVE_EVERY seconds, or less often where that takes long."""

    def __init__(self, training: Training, checkpoints: Checkpoints) -> None:
        self.training, self.checkpoints = training, checkpoints
        self._last, self._pause = time.perf_counter(), SAVE_EVERY

    @property
    def due(self) -> bool:
        """Whether the last save is long ago."""
        return time.perf_counter() - self._last > self._pause

    def save(self, *, urgent: bool = False) -> None:
        """Save the run as it is now; RunError where a weight is not finite, so that no such weight is ever saved."""
        training, start = self.training, time.perf_counter()
        check_weights(training.model, training.steps, self.checkpoints.last, training.ranks)
        training.ranks.share_buffers(training.model)
        self.checkpoints.save(training.steps, training.state_dict(), urgent=urgent)
        self._last = time.perf_counter()
        self._pause = max(SAVE_EVERY, (self._last - start) / SAVE_SHARE)


def finite_losses(training: Training, checkpoint: Path | None) -> Tensor:
    """The losses of the epoch so far, of all ranks; RunError where one is not finite."""
    losses = training.average_losses()
    check_losses(losses, training.steps - len(losses), checkpoint)
    return losses
