"""Lightning: its automatic loop, clipping, accumulation, averaging, and resuming from its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_bregman as tb

pytestmark = [
    pytest.mark.abroad,
    # Lightning itself uses what torch and the standard library will remove.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*"),
]
lightning = pytest.importorskip("lightning", reason="needs the extra `integrations`")

STEPS = 40
SHAPE = (30, 60, 10)


def dataset() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=generator).double() for shape in ((320, SHAPE[0]), (SHAPE[0], SHAPE[2])))
    return list(zip(x, (x @ w).argmax(1), strict=True))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SHAPE[0], SHAPE[1]), nn.ReLU(), nn.Linear(SHAPE[1], SHAPE[2]))
    tb.sparse_init_(model, 0.02, generator=torch.Generator().manual_seed(0))
    return model.double()  # a norm may be added up in another order, and Adam divides by what is small


class Module(lightning.LightningModule):
    """What a user writes: the optimizer from `configure_optimizers`, the controls after each of its steps."""

    def __init__(self, multilevel: int | None = None) -> None:
        super().__init__()
        self.model, self.multilevel, self.steps = network(), multilevel, 0
        self.losses: list[float] = []
        self.data: list[Any] | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return tb.AdaBreg(tb.param_groups(self.model, tb.L1()), lr=1e-2)

    def on_train_start(self) -> None:
        optimizer = self.optimizers()
        self.control = tb.TargetDensity(optimizer, 0.05, total_steps=STEPS)
        self.levels = tb.Multilevel(self.model, optimizer, coarse_steps=self.multilevel) if self.multilevel else None

    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.data is not None:  # after resuming, Lightning takes the first batch of the next epoch twice
            batch = self.data[self.global_step % len(self.data)]
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_step > self.steps:  # a step of the optimizer, not a part of an accumulated batch
            self.steps = self.global_step
            self.control.step()
            if self.levels is not None:
                self.levels.step()


def run(module: Module, folder: Path, *, steps: int = STEPS, resume: str | None = None, **options: Any) -> Any:
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=-1, **{"enable_checkpointing": False, **options},
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(dataset(), batch_size=16)
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


def by_hand(*, clip: float | None, accumulate: int, multilevel: int | None) -> nn.Module:
    """The same in a loop of one's own."""
    model = network()
    optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1()), lr=1e-2)
    control = tb.TargetDensity(optimizer, 0.05, total_steps=STEPS)
    levels = tb.Multilevel(model, optimizer, coarse_steps=multilevel) if multilevel else None
    batches = list(torch.utils.data.DataLoader(dataset(), batch_size=16))
    for i in range(STEPS):
        optimizer.zero_grad()
        for j in range(accumulate):
            x, y = batches[(i * accumulate + j) % len(batches)]
            (nn.functional.cross_entropy(model(x), y) / accumulate).backward()
        if clip is not None:
            held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            nn.utils.clip_grad_norm_(held, clip)
        optimizer.step()
        control.step()
        if levels is not None:
            levels.step()
    return model


@pytest.mark.parametrize("multilevel", [None, 3])
@pytest.mark.parametrize(("clip", "accumulate"), [(None, 1), (0.1, 1), (None, 2), (0.1, 2)])
def test_the_same_weights_as_the_plain_loop(clip, accumulate, multilevel, tmp_path):
    module = Module(multilevel)
    run(module, tmp_path, gradient_clip_val=clip, accumulate_grad_batches=accumulate)
    plain = by_hand(clip=clip, accumulate=accumulate, multilevel=multilevel)
    for ours, theirs in zip(module.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    weights = [module.model[0].weight, module.model[2].weight]
    alive = sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert alive == tb.density(module.model) == module.control.density == pytest.approx(0.05, abs=1e-3)
    assert sum(module.losses[-5:]) < sum(module.losses[:5])


def test_resumed_is_uninterrupted(tmp_path):
    """Lightning saves model and optimizer; the control is made anew in on_train_start."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    straight, again = Module(), Module()
    straight.data = again.data = list(torch.utils.data.DataLoader(dataset(), batch_size=16))
    every = ModelCheckpoint(
        tmp_path / "saved", "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True
    )
    run(straight, tmp_path, enable_checkpointing=True, callbacks=[every])
    run(again, tmp_path, resume=str(tmp_path / "saved" / "epoch=0.ckpt"))
    assert again.losses == straight.losses[20:]
    for ours, theirs in zip(again.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert again.control.steps == STEPS
    assert tb.density(again.model) == tb.density(straight.model) == pytest.approx(0.05, abs=1e-3)


def test_an_averaged_network_is_pruned_to_what_was_asked(tmp_path):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module = Module()
    run(module, tmp_path, callbacks=[EMAWeightAveraging(decay=0.9)])  # it leaves the average in the module
    assert tb.density(module.model) > 0.05
    tb.prune_(module.model, 0.05)
    assert tb.density(module.model) == pytest.approx(0.05, abs=1e-3)
