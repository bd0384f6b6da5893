"""One run, from the data to the report. Reads top to bottom."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from .. import kernels
from ..data import AUGMENTATIONS, Batches, Split, load
from ..density import sparsity_report
from ..distributed import local, sum_over_parts, whole
from ..files import write_atomically
from ..init import sparse_init_
from ..layers import weight_layers
from ..models import build
from ..models.skip import skips
from ..multilevel import Multilevel
from ..network.kinds.conv import is_miscomputed
from ..report import weight_pattern
from ..report.words import near
from ..rivals import Lasso, Rival, training_flops
from .checkpoints import checkpoints_of
from .denoising import Denoising, denoises, start_at_mean
from .display import Display
from .errors import RunError, Stopped, writing
from .graphs import Replayed
from .ranks import ONE_PROCESS, Processes, StatusChecks
from .recipe import (
    DENSE,
    RIVALS,
    Recipe,
    asked_density,
    densities,
    linear_and_conv_groups,
    make_control,
    make_levels,
    make_optimizer,
    make_rival,
    make_schedule,
)
from .ssim import similarity_on

SAVE_EVERY = 5.0  # seconds between checkpoints, or more:
SAVE_SHARE = 0.05  # they take no more than this share of the time, however large the network
LOOK_EVERY = 0.25  # seconds between looks at the loss, each of which waits for the device
EVALUATION_BATCH = 1000
SSIM_IMAGES = 1000  # of the validation data in every epoch; of the test data all


def fit(
    recipe: Recipe, run: Path, *, data_root: Path | None = None, quiet: bool = False, title: str = "",
    ranks: Processes = ONE_PROCESS,
) -> dict[str, Any]:  # fmt: skip
    """Train what `recipe` says in the folder `run`, going on from a checkpoint there; returns its last metrics row.

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

    data = ranks.in_turn(lambda: load(recipe.dataset, data_root, limit=recipe.limit)).to(device)
    steps_per_epoch = math.ceil(len(data.train) / recipe.batch_size)
    total_steps = recipe.epochs * steps_per_epoch

    torch.manual_seed(recipe.seed)
    model = build(recipe.model, data.shape, len(data.classes))
    denoising = Denoising.of(model, data, recipe)
    asked = asked_density(recipe, model)
    if recipe.optimizer not in (*DENSE, *RIVALS, "proxsgd"):
        start_sparse(recipe, model)
    if denoising:
        start_at_mean(model, denoising.clean(data.train.x))
    model.to(device)
    layout: dict[str, Any] = {}
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    safe = not any(is_miscomputed(module, module.weight) for module in convolutions)
    if convolutions and safe and ranks.strategy != "fsdp":
        layout = {"memory_format": torch.channels_last}
        model.to(**layout)
    if device.type == "cpu":
        threads = pick_threads(model, data.train.x[: recipe.batch_size], ranks.local_size)
        torch.set_num_threads(recipe.threads or threads)
    network = ranks.wrap(model, data.train.x[:2])  # `model` has the weights
    ranks.own_random_numbers(recipe.seed)
    optimizer = make_optimizer(recipe, model)
    control = make_control(recipe, optimizer, model, total_steps)
    schedule = make_schedule(recipe, optimizer, total_steps)
    levels = make_levels(recipe, optimizer, network)
    rival = make_rival(recipe, optimizer, model, total_steps)
    call: Callable[[Tensor], Tensor] = network
    if recipe.cuda_graphs and device.type == "cuda" and ranks.size == 1:
        call = Replayed(model, recipe.batch_size)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
    mixed: Callable[[], Any] = nullcontext
    if recipe.precision != "32":
        dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float16
        mixed = lambda: torch.autocast(device.type, dtype)  # noqa: E731
    order = torch.Generator().manual_seed(recipe.seed)
    noise = torch.Generator(device).manual_seed(recipe.seed)
    augment = None if recipe.augment == "none" else AUGMENTATIONS[recipe.augment]
    batches = Batches(data.train, recipe.batch_size, generator=order, augment=augment)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        if denoising:
            noisy, clean = ranks.part(denoising.noisy(x, noise), denoising.clean(x))
            return F.mse_loss(call(noisy), clean)
        x, y = ranks.part(x, y)
        return F.cross_entropy(call(x), y)

    similarity = similarity_on(data) if denoising else None

    def scores_on(split: Split, images: int) -> dict[str, float]:
        return evaluate(model, split, denoising, mixed, layout, ranks, similarity, images)

    losses = torch.full((steps_per_epoch,), math.nan, device=device)
    rows: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    first_epoch, done, spent = 1, 0, 0.0

    def state(epoch: int, batch: int) -> dict[str, Any]:
        """All that the rest of the run depends on, after `batch` batches of `epoch`."""
        return {
            "recipe": asdict(recipe),
            "epoch": epoch, "batch": batch, "losses": losses, "rows": rows, "best": best,
            "seconds": spent + time.perf_counter() - began,
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
            "control": control.state_dict() if control else {}, "levels": levels.state_dict() if levels else {},
            "rival": rival.state_dict() if rival else {},
            "scaler": scaler.state_dict(),
            "order": order_at_start, "noise": noise.get_state(), "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }  # fmt: skip

    with Display(
        recipe.epochs, steps_per_epoch, asked=asked, quiet=quiet, title=title, silent=not ranks.first
    ) as display, checkpoints_of(run, display.message, ranks) as checkpoints:  # fmt: skip
        saved = checkpoints.load(model, optimizer)
        if saved is None:
            order_at_start = order.get_state()
        else:
            if saved["recipe"] != asdict(recipe):
                changed = [k for k, v in asdict(recipe).items() if saved["recipe"].get(k) != v]
                raise RunError(f"The checkpoint {checkpoints.path} was made with other options: {', '.join(changed)}.")
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            if control:
                control.load_state_dict(saved["control"])
            if levels:
                levels.load_state_dict(saved["levels"])
            if rival:
                rival.load_state_dict(saved["rival"])
            scaler.load_state_dict(saved["scaler"])
            first_epoch, done, spent = saved["epoch"], saved["batch"], saved["seconds"]
            rows, best = saved["rows"], saved["best"]
            losses.copy_(saved["losses"])
            order_at_start = saved["order"]
            order.set_state(order_at_start)
            noise.set_state(saved["noise"])
            if saved["random"] is not None:
                torch.set_rng_state(saved["random"])
            if saved["cuda"] is not None and device.type == "cuda":
                torch.cuda.set_rng_state(saved["cuda"], device)
            for row in rows[-12:]:
                display.epoch(row)
            display.message(f"Resumed {run} at epoch {first_epoch}, step {done} of {steps_per_epoch}.")
        if levels and not kernels.available():
            display.message("Without the extra 'fast' only dead units make --multilevel faster.")
        elif levels and device.type == "cpu" and not kernels.compiled_before("csr"):
            display.message("The first sparse steps compile their kernels: some seconds, once on this machine.")
        display.start(first_epoch - 1)
        began = last_save = time.perf_counter()
        checks = StatusChecks(ranks, LOOK_EVERY)
        pause = SAVE_EVERY

        def save(epoch: int, batch: int, *, urgent: bool = False) -> None:
            nonlocal last_save, pause
            start = time.perf_counter()
            step = (epoch - 1) * steps_per_epoch + batch
            check_weights(model, step, checkpoints.last, ranks)
            ranks.share_buffers(model)
            checkpoints.save(step, state(epoch, batch), urgent=urgent)
            last_save = time.perf_counter()
            pause = max(SAVE_EVERY, (last_save - start) / SAVE_SHARE)

        metrics = Metrics(run, rows, silent=not ranks.first)

        with stop_signals(patient=ranks.size > 1) as stopping:
            if not rows:
                scores = scores_on(data.validation, SSIM_IMAGES)
                rows.append(measure(0, None, scores, model, optimizer, asked, 0.0, 0.0))
                metrics.add(rows[0])
                keep_patterns(run, "start", model, ranks)
            for epoch in range(first_epoch, recipe.epochs + 1):
                model.train()
                epoch_began = time.perf_counter()
                i = averaged = done
                for x, y in batches.epoch(skip=done):
                    if layout:
                        x = x.contiguous(**layout)
                    optimizer.zero_grad()
                    with mixed():
                        loss = ranks.weigh(loss_of(x, y), len(x))
                    whole = loss + rival.penalty() if isinstance(rival, Lasso) else loss
                    scaler.scale(whole).backward()  # type: ignore[no-untyped-call]
                    scaler.step(optimizer)
                    scaler.update()
                    if control:
                        control.step()
                    if levels:
                        levels.step()
                    if rival:
                        rival.step()
                    if recipe.schedule != "plateau":
                        schedule.step()
                    losses[i] = loss.detach()
                    del loss, whole  # with the graph, which must not live while the next one is recorded
                    i += 1
                    display.advance(len(x))
                    if checks.due(stopping()):
                        stop, late = checks.agree(stopping(), time.perf_counter() - last_save > pause)
                        ranks.average_(losses[averaged:i])
                        averaged = i
                        display.loss(finite(losses[:i], epoch, steps_per_epoch, checkpoints.last)[-1].item())
                        checkpoints.look()
                        if stop or late:
                            save(epoch, i, urgent=stop)
                        if stop:
                            checkpoints.wait()
                            raise Stopped(f"Stopped at epoch {epoch}, step {i} of {steps_per_epoch}; saved.")

                ranks.average_(losses[averaged:])
                train_loss = finite(losses, epoch, steps_per_epoch, checkpoints.last).mean().item()
                seconds = time.perf_counter() - epoch_began
                scores = scores_on(data.validation, SSIM_IMAGES)
                rate = recipe.batch_size * (i - done) / max(seconds, 1e-9)
                row = measure(epoch, train_loss, scores, model, optimizer, asked, seconds, rate) | work(levels)
                rows.append(row)
                metrics.add(row)
                display.epoch(row)
                if recipe.schedule == "plateau":
                    schedule.step(scores["val_loss"])
                score = scores.get("val_accuracy", -scores["val_loss"])
                # A model off the density that was asked for is never the best one; of equals the later is the nearer.
                if (asked is None or row["on_target"]) and score >= best.get("score", -math.inf):
                    best = {"epoch": epoch, "score": score, **scores}
                    save_model(run / "best.safetensors", model, ranks)
                if epoch == (recipe.epochs + 1) // 2:
                    keep_patterns(run, "middle", model, ranks)
                done, losses[:] = 0, math.nan
                order_at_start = order.get_state()
                if any(ranks.any(epoch == recipe.epochs or time.perf_counter() - last_save > pause)):
                    save(epoch + 1, 0, urgent=epoch == recipe.epochs)

    seconds = spent + time.perf_counter() - began
    save_model(run / "last.safetensors", model, ranks)
    if best:
        load_model(run / "best.safetensors", model, ranks)
    keep_patterns(run, "end", model, ranks)
    # The one time the test data are touched.
    scores = scores_on(data.test, len(data.test))
    report = sparsity_report(model)
    kept, size = report.weights
    forward, samples = forward_flops(model, data.train.x[:1]), len(data.train) * recipe.epochs
    end = {
        "event": "end",
        "asked_density": asked, "density": kept / size, "kept": kept, "weights": size,
        **{name.replace("val_", "test_"): value for name, value in scores.items()},
        **{name: value for name, value in best.items() if name.startswith("val_")},
        "widths": [layer.outputs[0] for layer in report.layers],
        "full_widths": [layer.outputs[1] for layer in report.layers],
        "kept_linear": share([layer.weights for layer in report.layers if len(layer.shape) == 2]),
        "kept_kernels": share([report.kernels]),
        "best_epoch": best.get("epoch"), "lam": rows[-1]["lam"], "seconds": round(seconds, 3), "note": data.note,
        "dense_flops": training_flops(forward, {}, samples), **work(levels),
        "sparse_flops": sparse_flops(forward, samples, rows, rival, levels),
    }  # fmt: skip
    if gates := skips(model):
        end["skips"] = gates
    if levels:
        end["choices"] = levels.report.rows()
    metrics.add(end)
    metrics.close()
    return end


def pick_device(name: str) -> torch.device:
    """The device called `name`, "auto" for a GPU where there is one; ValueError where it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"Invalid `device`: {name!r}; it cannot be used here ({str(error).splitlines()[0]})."
        ) from None
    return torch.device(name)


def pick_threads(model: nn.Module, x: Tensor, processes: int = 1) -> int:
    """All cores, or 1 for a network so small that threads cost more than they save: under a GFLOP per forward pass.

    `processes` of this machine share the cores. A rule and not a timing, for the number of threads decides about the
    last bits of a run.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(x)
    model.train()
    return 1 if counter.get_total_flops() < 1e9 else max((os.cpu_count() or 1) // processes, 1)


def start_sparse(recipe: Recipe, model: nn.Module) -> None:
    """Draw the sparse start in groups that fit the regulariser."""
    wanted = densities(recipe, model)
    generator = torch.Generator().manual_seed(recipe.seed)
    layers = list(weight_layers(model))
    # Few rows alive is a low rank, the sparse start of the nuclear norm.
    low_rank = recipe.regularizer == "nuclear"
    chosen = ("rows", "filters") if low_rank else linear_and_conv_groups(recipe)
    normed = any(isinstance(module, nn.modules.batchnorm._NormBase) for module in model.modules())
    for groups, linear in zip(chosen, (True, False), strict=True):
        for _, module, weight in layers:
            if (weight.dim() == 2) == linear:
                start = min(recipe.initial_density, wanted.get(weight, 1.0) / 2)
                # A norm takes the bias off again that would wake a unit without inputs.
                asleep = normed or getattr(module, "bias", None) is None
                sparse_init_(module, start, groups, generator, min_inputs=int(asleep))
                if recipe.regularizer == "nonnegative-l1":
                    weight.data.abs_()
    if not layers:
        return  # the optimizer has the sentence for it
    _, _, first = layers[0]
    if chosen[first.dim() != 2] is not None:
        # 1/r makes up for what is dead in the layer before, but all of the data are alive: here only the share of the
        # inputs counts that a live unit has.
        alive = first.data.flatten(1) != 0
        first.data.mul_((alive.float().mean() / alive[alive.any(1)].float().mean()).sqrt())
    if denoises(model):
        # With a random image at the output the first steps push all neurons away from it, and most ReLUs die.
        layers[-1].weight.data.mul_(0.1)


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, denoising: Denoising | None, mixed: Callable[[], Any], layout: dict[str, Any],
    ranks: Processes = ONE_PROCESS, similarity: Callable[[Tensor, Tensor], list[float]] | None = None, images: int = 0,
) -> dict[str, float]:  # fmt: skip
    """val_loss; val_accuracy where there are classes; with `similarity` the mean val_ssim of the first `images`.

    In eval mode, so that norms keep their statistics. With several ranks `images` is rounded up to a batch.
    """
    ranks.share_buffers(model)
    training = model.training
    model.eval()
    loss = torch.zeros((), device=split.x.device)
    correct = torch.zeros((), device=split.x.device)
    alike: list[float] = []
    seen = 0
    generator = torch.Generator(split.x.device).manual_seed(0)  # the same noise in every epoch
    for x, y in Batches(split, EVALUATION_BATCH):
        with mixed():
            if denoising:
                noisy, clean = ranks.part(denoising.noisy(x, generator), denoising.clean(x))
                made, count = model(noisy), ranks.count(len(x))
                loss += F.mse_loss(made, clean) * count
                if similarity is not None and seen < images:
                    room = min(images - seen, count) if ranks.size == 1 else count
                    alike += similarity(made[:room], clean[:room])
                seen += len(x)
            else:
                mine, labels = ranks.part(x, y)
                out = model(mine.contiguous(**layout) if layout else mine)
                if ranks.count(len(x)):
                    loss += F.cross_entropy(out, labels, reduction="sum")
                    correct += (out.argmax(1) == labels).sum()
    model.train(training)
    all_loss, all_correct = ranks.total(loss, correct)
    scores = {"val_loss": all_loss / len(split)}
    if not denoising:
        scores["val_accuracy"] = all_correct / len(split)
    if similarity is not None:
        of_all, number = ranks.total(*torch.tensor([sum(alike), len(alike)], dtype=torch.float64))
        scores["val_ssim"] = of_all / number
    return scores


def measure(
    epoch: int, train_loss: float | None, scores: dict[str, float], model: nn.Module,
    optimizer: torch.optim.Optimizer, asked: float | None, seconds: float, rate: float,
) -> dict[str, Any]:  # fmt: skip
    """The metrics row of an epoch."""
    report = sparsity_report(model)
    group = optimizer.param_groups[0]
    lam = group.get("lam")
    return {
        "epoch": epoch, "train_loss": train_loss, **scores, "density": report.density,
        "on_target": near(report.density, asked), "l1_norm": l1_norm(model),
        "lam": float(lam) if lam is not None else None, "lr": float(group["lr"]),
        "seconds": round(seconds, 3), "images_per_second": round(rate),
        "layers": {layer.name: layer.density for layer in report.layers},
        "kept_layers": {layer.name: layer.weights[0] for layer in report.layers},
        "size_layers": {layer.name: layer.weights[1] for layer in report.layers},
        "shape_layers": {layer.name: list(layer.shape) for layer in report.layers},
    }  # fmt: skip


@torch.no_grad()
def l1_norm(model: nn.Module) -> float:
    """The sum of |w| over all Linear and Conv weights."""
    weights = [layer.weight for layer in weight_layers(model)]
    return float(sum_over_parts(torch.stack([local(w).abs().sum() for w in weights]), weights).sum())


def work(levels: Multilevel | None) -> dict[str, Any]:
    """The steps of each kind so far and their FLOPs, beside those of dense steps."""
    if levels is None:
        return {}
    fine, coarse = levels.counts["fine"], levels.counts["coarse"]
    return {"fine_steps": fine, "coarse_steps": coarse, "flops": levels.flops, "dense_flops": levels.dense_flops}


def forward_flops(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Weight of a Linear or Conv layer → FLOPs of its dense forward pass on `x`."""
    training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(x)
    model.train(training)
    # Modules are called by the name of the root's class and their own.
    counts = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    return {name: float(counts.get(name.rpartition(".")[0], 0)) for name, _, _ in weight_layers(model)}


def sparse_flops(
    forward: dict[str, float], samples: int, rows: list[dict[str, Any]], rival: Rival | None, levels: Multilevel | None
) -> float:
    """FLOPs of the run on `samples` samples if zeros cost nothing (`training_flops`); `forward`: of one of them.

    A Bregman step needs the gradient of all weights, but for the coarse ones. Its densities are those before and after
    each epoch, averaged; a rival counts those of its steps.
    """
    if rival is not None:
        return rival.flops({name: flops * samples / rival.steps for name, flops in forward.items()})
    layers = [row["layers"] for row in rows]
    ends = list(itertools.pairwise(layers))
    densities = {name: sum(a[name] + b[name] for a, b in ends) / (2 * len(ends)) for name in forward}
    if min(densities.values()) == 1:  # trained dense
        return training_flops(forward, {}, samples)
    coarse = levels.counts["coarse"] / levels.counts.total() if levels is not None else 0.0
    return training_flops(forward, densities, samples, round(samples * (1 - coarse)))


def share(counts: list[tuple[int, int]]) -> float | None:
    """What is alive of all; None where there is nothing."""
    size = sum(size for _, size in counts)
    return sum(alive for alive, _ in counts) / size if size else None


def finite(losses: Tensor, epoch: int, steps_per_epoch: int, checkpoint: Path | None) -> Tensor:
    """The losses, or a RunError that names the first step at which one was not finite."""
    wrong = (~losses.isfinite()).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise not_finite(f"The loss became {losses[i].item()}", (epoch - 1) * steps_per_epoch + i + 1, checkpoint)
    return losses


def check_weights(model: nn.Module, step: int, checkpoint: Path | None, ranks: Processes) -> None:
    """RunError where a weight is not finite, so that no such weight is ever saved."""
    good = torch.stack([local(p).isfinite().all() for p in model.parameters()]).all()
    if any(ranks.any(not good)):
        raise not_finite("A weight became infinite or nan", step, checkpoint)


def not_finite(what: str, step: int, checkpoint: Path | None) -> RunError:
    saved = f"the last good checkpoint is {checkpoint}" if checkpoint is not None else "nothing was saved yet"
    return RunError(f"{what} at step {step}; {saved}. A smaller --lr may help.")


@contextmanager
def stop_signals(*, patient: bool = False) -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM set a flag that the loop reads; a second one interrupts at once.

    `patient`: it does not, for torchrun sends one that the terminal has sent already, and kills who takes too long.
    """
    flag = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if flag.is_set() and not patient:
            raise KeyboardInterrupt
        flag.set()

    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Metrics:
    """metrics.jsonl, and the same as TensorBoard events where TensorBoard is installed."""

    def __init__(self, run: Path, rows: list[dict[str, Any]], *, silent: bool = False) -> None:
        self.path = run / "metrics.jsonl"
        self.board: Any = None
        self.silent = silent
        if silent:
            return
        # What a killed run wrote after its last checkpoint is written again by the resumed one.
        with writing(self.path):
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=len(rows) or None)

    def add(self, row: dict[str, Any]) -> None:
        if self.silent:
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise RunError(f"Could not write {self.path}: {error.strerror}.") from None
        if self.board is not None:
            step = row.get("epoch") or row.get("best_epoch") or 0
            for name, value in row.items():
                if isinstance(value, int | float) and name not in ("epoch", "best_epoch"):
                    self.board.add_scalar(name, value, step)
            for name, value in row.get("layers", {}).items():
                self.board.add_scalar(f"density/{name}", value, step)
            self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def keep_patterns(run: Path, when: str, model: nn.Module, ranks: Processes) -> None:
    """Add the pictures of where the weights are non-zero to patterns.npz."""
    path = run / "patterns.npz"
    new = {
        f"{when}/{name}": weight_pattern(whole(w.detach(), lambda part: part).cpu())
        for name, _, w in weight_layers(model)
    }
    if not ranks.first:
        return
    pictures: dict[str, np.ndarray[Any, Any]] = {}
    if path.exists() and when != "start":
        with np.load(path, allow_pickle=False) as old:
            pictures = {name: old[name] for name in old.files}
    with writing(path):
        write_atomically(path, lambda file: np.savez_compressed(file, **(pictures | new)))  # type: ignore[arg-type]


def save_model(path: Path, model: nn.Module, ranks: Processes = ONE_PROCESS) -> None:
    """The weights as safetensors."""
    state = ranks.whole_state(model)
    if not ranks.first:
        return
    tensors = {name: value.contiguous().cpu() for name, value in state.items()}
    # One copy of tied tensors: safetensors refuses two names for one memory.
    seen: dict[int, str] = {}
    unique = {n: t for n, t in tensors.items() if t.numel() == 0 or seen.setdefault(t.data_ptr(), n) == n}
    with writing(path):
        write_atomically(path, to_safetensors(unique))


def load_model(path: Path, model: nn.Module, ranks: Processes = ONE_PROCESS) -> None:
    """Read what `save_model` wrote."""
    from safetensors.torch import load_file

    ranks.load_whole_state(model, load_file(path) if ranks.first else {})
