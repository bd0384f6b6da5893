"""Hugging Face Transformers: its networks, and its Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR

import torch_bregman as tb

pytestmark = [
    pytest.mark.abroad,
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning"),
]
transformers = pytest.importorskip("transformers", reason="needs the extra `integrations`")

from networks import NAMES, alive, batches, build, matrices, samples  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402


@pytest.mark.parametrize("name", NAMES)
def test_asked_is_got_in_every_network(name):
    model = build(name)
    tb.sparse_init_(model, 0.02)
    assert alive(model) == pytest.approx(0.02, abs=2e-3)
    optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1()), lr=1e-2)
    control = tb.TargetDensity(optimizer, 0.05, total_steps=60)
    losses = []
    for batch in batches(name, 60):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        control.step()
        losses.append(loss.item())
    size = sum(p.numel() for p in matrices(model).values())
    assert alive(model) == pytest.approx(0.05, abs=1 / size)
    assert tb.density(model) == control.density == alive(model)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert {layer.name for layer in tb.sparsity_report(model).layers} == set(matrices(model))
    for module, fresh in zip(model.modules(), build(name).modules(), strict=True):
        if isinstance(module, torch.nn.Embedding):  # no token lost its row; that of padding may have been zero before
            assert torch.equal((module.weight != 0).any(1), (fresh.weight != 0).any(1))


class Sparse(TrainerCallback):
    """What a user writes: the controls step after the optimizer."""

    def __init__(self, density: float = 0.05, **multilevel: Any) -> None:
        self.asked, self.multilevel = density, multilevel

    def on_train_begin(self, args, state, control, *, model, optimizer, **others) -> None:
        self.control = tb.TargetDensity(optimizer, self.asked, total_steps=state.max_steps)
        self.levels = tb.Multilevel(model, optimizer, **self.multilevel) if self.multilevel else None

    def on_optimizer_step(self, args, state, control, **others) -> None:
        self.control.step()
        if self.levels is not None:
            self.levels.step()


def trained(
    name: str,
    folder: Path,
    callback: Sparse,
    *,
    double: bool = False,
    seed: int = 0,
    stop: int | None = None,
    **options: Any,
):
    """A network after a run of the Trainer; with `stop` the run ends there, and goes on from what was saved."""
    resume = None
    for last in [40] if stop is None else [stop, 40]:
        model = build(name, seed)
        tb.sparse_init_(model, 0.02, generator=torch.Generator().manual_seed(seed))
        if double:
            model.double()
        optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1()), lr=1e-2)
        args = TrainingArguments(
            output_dir=str(folder), max_steps=40, per_device_train_batch_size=8, use_cpu=True, report_to="none",
            disable_tqdm=True, logging_steps=1000, save_steps=stop or 1000, seed=seed, **options,
        )  # fmt: skip
        trainer = Trainer(
            model, args, train_dataset=samples(name, 160), callbacks=[callback, Stop(last)],
            optimizers=(optimizer, None if "lr_scheduler_type" in options else ConstantLR(optimizer, 1.0)),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        resume = str(folder / f"checkpoint-{last}")
    return model


class Stop(TrainerCallback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args, state, control, **others) -> None:
        control.should_training_stop |= state.global_step >= self.after


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bert", {}), ("gpt2", {"gradient_checkpointing": True}), ("llama", {"bf16": True}),
        ("t5", {"gradient_accumulation_steps": 3}), ("mixtral", {"lr_scheduler_type": "cosine", "warmup_steps": 5}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("multilevel", [{}, {"coarse_steps": 3}])
def test_trainer(name, options, multilevel, tmp_path):
    callback = Sparse(**multilevel)
    model = trained(name, tmp_path, callback, **options)
    assert tb.density(model) == callback.control.density == alive(model) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_trainer_resumes_as_if_nothing_had_happened(name, tmp_path):
    """The Trainer saves model, optimizer and data order; the control is made anew by the callback."""
    straight = trained(name, tmp_path / "a", Sparse())
    again = trained(name, tmp_path / "b", Sparse(), stop=17)
    for (key, ours), theirs in zip(again.named_parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs), key
    assert tb.density(again) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.1}])
def test_multilevel_under_the_trainer_is_the_plain_loop(options, tmp_path):
    """The Trainer clears by model.zero_grad() and clips model.parameters(): the same weights as by hand."""
    callback = Sparse(coarse_steps=3)
    args = {"max_grad_norm": 1.0, **options}
    model = trained("gpt2", tmp_path, callback, double=True, **args)

    torch.manual_seed(0)
    plain = build("gpt2")
    tb.sparse_init_(plain, 0.02, generator=torch.Generator().manual_seed(0))
    plain.double()  # a norm may be added up in another order, and Adam divides by what is small
    optimizer = tb.AdaBreg(tb.param_groups(plain, tb.L1()), lr=1e-2)
    control = tb.TargetDensity(optimizer, 0.05, total_steps=40)
    levels = tb.Multilevel(plain, optimizer, coarse_steps=3)
    for batch in seen(options, tmp_path):
        optimizer.zero_grad()
        tokens = sum(part["labels"].numel() for part in batch)  # the Trainer divides by these
        for part in batch:
            plain(**part, num_items_in_batch=tokens).loss.backward()
        held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(held, args["max_grad_norm"])
        optimizer.step()
        control.step()
        levels.step()
    for (key, ours), theirs in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs[1], rtol=1e-7, atol=1e-8, msg=key)
    assert tb.density(model) == pytest.approx(0.05, abs=1e-4)


def seen(options: dict[str, Any], folder: Path) -> list[list[dict[str, torch.Tensor]]]:
    """The batches of every step of such a run, in its order."""
    accumulated = options.get("gradient_accumulation_steps", 1)
    record: list[dict[str, torch.Tensor]] = []

    class Recorder(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            record.append({key: value.clone() for key, value in inputs.items()})
            return super().compute_loss(model, inputs, *args, **kwargs)

    model = build("gpt2")
    arguments = TrainingArguments(
        output_dir=str(folder / "order"), max_steps=40, per_device_train_batch_size=8, use_cpu=True, report_to="none",
        disable_tqdm=True, logging_steps=1000, save_steps=1000, seed=0, gradient_accumulation_steps=accumulated,
    )  # fmt: skip
    Recorder(
        model, arguments, train_dataset=samples("gpt2", 160), optimizers=(torch.optim.SGD(model.parameters()), None)
    ).train()
    return [record[i : i + accumulated] for i in range(0, len(record), accumulated)]


def test_a_trained_network_becomes_the_start_by_pruning():
    model = build("llama")
    dense = copy.deepcopy(model)
    tb.prune_(model, 0.05)
    assert alive(model) == pytest.approx(0.05, abs=1e-4)
    kept = {key: p != 0 for key, p in matrices(model).items()}
    for key, p in matrices(dense).items():
        assert torch.equal(matrices(model)[key][kept[key]], p[kept[key]])


def test_what_onnx_lacks_is_named_with_the_line_that_does_without(tmp_path):
    pytest.importorskip("onnxscript")
    model = build("mixtral").eval()
    ids = next(iter(batches("mixtral", 1)))["input_ids"]
    with pytest.raises(ValueError, match=r"it returns a DynamicCache.*model.config.use_cache = False"):
        tb.save_onnx(model, ids, tmp_path / "net.onnx")
    model.config.use_cache = False
    with pytest.raises(ValueError, match=r"grouped_mm.* in model.layers.0.mlp.experts \(MixtralExperts\)") as caught:
        tb.save_onnx(model, ids, tmp_path / "net.onnx")
    assert 'model.set_experts_implementation("batched_mm")' in str(caught.value)
    model.set_experts_implementation("batched_mm")
    tb.save_onnx(model, ids, tmp_path / "net.onnx")


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_inference_is_sparse_on_tokens(name, monkeypatch):
    monkeypatch.setattr("torch_bregman.inference.choice.seconds_of", lambda jobs, seconds=0.0, of=min: {
        job: 1e-6 if job.startswith("sparse") else 1e-3 for job in jobs
    })  # fmt: skip
    model = build(name).eval()
    tb.sparse_init_(model, 0.05)
    ids = next(iter(batches(name, 1)))["input_ids"]
    fast = tb.optimize_for_inference(model, (ids,))
    layers = {row.name: row.chosen for row in fast.report.layers}
    assert set(layers.values()) == {"sparse"}, fast.report
    assert {layer.name.removesuffix(".weight") for layer in tb.sparsity_report(model).layers} <= layers.keys()
    for given in (ids, ids[:3, :5]):
        torch.testing.assert_close(fast(given).logits, model(given).logits, rtol=0, atol=1e-5)
