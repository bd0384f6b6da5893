"""--strategy fsdp: every rank has a part of each weight, and trains what one process trains."""

import shutil
from pathlib import Path

import pytest
import torch
from several import together
from test_faults import recipe, rows_of, stopped_at, weights_of

from torch_bregman.train import fit, loop
from torch_bregman.train.errors import Stopped
from torch_bregman.train.ranks import start

CASES = {
    "mlp": {},
    "groups": {"model": "convnet", "optimizer": "linbreg", "regularizer": "group-l1", "epochs": 1},
    "adam": {"optimizer": "adam", "density": None},
}
STOP = 4


def train_all(folder: str) -> None:
    """What each rank does: all cases in one go, and in two parts; then what others have begun."""
    loop.LOOK_EVERY = loop.SAVE_EVERY = 0.0
    with start("fsdp", recipe({}), 60.0) as ranks:
        for name, options in CASES.items():
            fit(recipe(options), Path(folder) / name / "whole", quiet=True, ranks=ranks)
            run = Path(folder) / name / "parts"
            with stopped_at((STOP,), rank=1):
                with pytest.raises(Stopped):
                    fit(recipe(options), run, quiet=True, ranks=ranks)
                ranks.on_first(lambda run=run: shutil.copytree(run, run.with_name("stopped")))
                fit(recipe(options), run, quiet=True, ranks=ranks)
        fit(recipe({}), Path(folder) / "alone", quiet=True, ranks=ranks)
    with start("ddp", recipe({}), 60.0) as ranks:
        run = Path(folder) / "ddp"
        ranks.on_first(lambda: shutil.copytree(Path(folder) / "mlp" / "stopped", run))
        fit(recipe({}), run, quiet=True, ranks=ranks)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    with pytest.MonkeyPatch.context() as patch:  # a run of one process, that two go on with
        patch.setattr(loop, "LOOK_EVERY", 0.0)
        with stopped_at((STOP,)), pytest.raises(Stopped):
            fit(recipe({}), folder / "alone", quiet=True)
    together("test_fsdp", "train_all", 2, folder)
    return folder


def assert_close(run: Path, other: Path) -> None:
    for key, weight in weights_of(run).items():
        assert torch.equal(weight == 0, weights_of(other)[key] == 0), key
        torch.testing.assert_close(weights_of(other)[key], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_fsdp_trains_what_one_process_trains(trained, tmp_path, name):
    end = fit(recipe(CASES[name]), tmp_path, quiet=True)
    assert_close(tmp_path, trained / name / "whole")
    other = rows_of(trained / name / "whole")[-1]
    assert other["kept"] == end["kept"]
    assert other["test_loss"] == pytest.approx(end["test_loss"], rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_goes_on_bit_for_bit(trained, name):
    for key, weight in weights_of(trained / name / "whole").items():
        assert torch.equal(weight, weights_of(trained / name / "parts")[key]), key


def test_every_strategy_goes_on_with_what_another_has_saved(trained, tmp_path):
    run = shutil.copytree(trained / "mlp" / "stopped", tmp_path / "run")
    fit(recipe({}), run, quiet=True)
    for other in (run, trained / "alone", trained / "ddp"):
        assert_close(trained / "mlp" / "whole", other)
