"""Ranks that are stopped, killed, or late, disks that are full, and files that are damaged."""

import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from several import outcome, together, torchrun
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from torch_bregman.train import Recipe, fit, loop
from torch_bregman.train.errors import RunError, Stopped
from torch_bregman.train.ranks import ONE_PROCESS, start


def norm_net(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Running statistics and dropout: state that each rank has for itself."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(shape[-1] * shape[-2], 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(40, classes),
    )  # fmt: skip


CASES = {
    "mlp": {},
    "norm": {"model": "test_faults:norm_net", "optimizer": "linbreg", "lr": 0.05, "schedule": "plateau"},
    "bf16": {"precision": "bf16", "control": "exact"},
    "adam": {"optimizer": "adam", "density": None},
}
STOPS = (5, 13, 14)


def recipe(options: dict) -> Recipe:
    return Recipe(**{"epochs": 4, "density": 0.1, "limit": 300, "batch_size": 64, "threads": 1, **options}).check()


@contextmanager
def stopped_at(steps: tuple[int, ...], rank: int = 0):
    """SIGTERM for `rank` after these steps, which all ranks are to hear of."""
    counted = [0]

    def count(optimizer, *_):
        counted[0] += 1
        if counted[0] in steps and int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), signal.SIGTERM)

    handle = register_optimizer_step_post_hook(count)
    yield
    handle.remove()


@contextmanager
def struck_at(step: int, fault):
    """`fault(optimizer)` on the second rank after this step."""
    counted = [0]

    def count(optimizer, *_):
        counted[0] += 1
        if counted[0] == step and os.environ["RANK"] == "1":
            fault(optimizer)

    handle = register_optimizer_step_post_hook(count)
    yield
    handle.remove()


def spoil(optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].fill_(float("nan"))


def train_in_parts(folder: str) -> None:
    """What each rank does: every case in one go, and in parts; then with faults."""
    rank = os.environ["RANK"]
    loop.LOOK_EVERY = loop.SAVE_EVERY = 0.0
    with start("ddp", recipe({}), 60.0) as ranks:
        for name, options in CASES.items():
            fit(recipe(options), Path(folder) / name / "whole", quiet=True, ranks=ranks)
        for name, options in CASES.items():
            run = Path(folder) / name / "parts"
            with stopped_at(STOPS, rank=1):
                for _ in STOPS:
                    with pytest.raises(Stopped, match="Stopped at epoch"):
                        fit(recipe(options), run, quiet=True, ranks=ranks)
                ranks.on_first(lambda run=run: shutil.copytree(run, run.with_name("stopped")))
                fit(recipe(options), run, quiet=True, ranks=ranks)
        fit(recipe({}), Path(folder) / "alone", quiet=True, ranks=ranks)
        with struck_at(12, lambda _: time.sleep(1)):
            fit(recipe({}), Path(folder) / "late", quiet=True, ranks=ranks)
        with struck_at(12, spoil), pytest.raises(RunError) as stop:
            fit(recipe({}), Path(folder) / "nan", quiet=True, ranks=ranks)
        (Path(folder) / "nan" / f"said-{rank}").write_text(str(stop.value))
        said = io.StringIO()
        small = 20_000  # bytes in a file: enough for all but the shares of the checkpoints
        resource.setrlimit(resource.RLIMIT_FSIZE, (small, resource.RLIM_INFINITY))
        with redirect_stdout(said):
            fit(recipe({"model": "test_faults:norm_net"}), Path(folder) / "full", quiet=True, ranks=ranks)
        (Path(folder) / "full" / f"said-{rank}").write_text(said.getvalue())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as patch:  # a run of one process, that two go on with
        patch.setattr(loop, "LOOK_EVERY", 0.0)
        with stopped_at((7,)), pytest.raises(Stopped):
            fit(recipe({}), folder / "alone", quiet=True)
    together("test_faults", "train_in_parts", 2, folder)
    return folder


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last.safetensors")


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- stopped and resumed


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_that_were_stopped_go_on_bit_for_bit(trained, name):
    for key, weight in weights_of(trained / name / "whole").items():
        assert torch.equal(weight, weights_of(trained / name / "parts")[key]), key
    same = ("train_loss", "val_loss", "density", "lam")
    whole, parts = rows_of(trained / name / "whole"), rows_of(trained / name / "parts")
    assert [[row.get(k) for k in same] for row in whole] == [[row.get(k) for k in same] for row in parts]


def test_one_process_goes_on_with_what_two_have_saved(trained, tmp_path):
    run = shutil.copytree(trained / "mlp" / "stopped", tmp_path / "run")
    fit(recipe({}), run, quiet=True)
    for key, weight in weights_of(trained / "mlp" / "whole").items():
        torch.testing.assert_close(weights_of(run)[key], weight, rtol=1e-5, atol=1e-5)
    assert (run / "checkpoint.pt").exists()


def test_two_ranks_go_on_with_what_one_process_has_saved(trained, tmp_path):
    fit(recipe({}), tmp_path, quiet=True)
    for key, weight in weights_of(tmp_path).items():
        torch.testing.assert_close(weights_of(trained / "alone")[key], weight, rtol=1e-5, atol=1e-5)


def train_until(folder: str, step: str) -> None:
    """What each rank does: train on, to the end or to a stop after so many steps from here."""
    loop.LOOK_EVERY = loop.SAVE_EVERY = 0.0
    with start("ddp", recipe({}), 60.0) as ranks, stopped_at((int(step),)):
        try:
            fit(recipe({}), Path(folder), quiet=True, ranks=ranks)
        except Stopped:
            assert step != "0"
        else:
            assert step == "0"


@pytest.mark.slow
def test_four_ranks_then_two_then_four_are_as_one_run(tmp_path):
    together("test_faults", "train_until", 4, tmp_path / "whole", 0)
    for size, step in ((4, 6), (2, 5), (4, 0)):
        together("test_faults", "train_until", size, tmp_path / "parts", step)
    whole, parts = rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts")
    for key in ("train_loss", "val_loss", "test_loss"):
        expected = [row[key] for row in whole if row.get(key) is not None]
        assert [row[key] for row in parts if row.get(key) is not None] == pytest.approx(expected, rel=1e-6)
    for key, weight in weights_of(tmp_path / "whole").items():
        assert torch.equal(weights_of(tmp_path / "parts")[key] != 0, weight != 0), key


# ---------------------------------------------------------------------- faults while it trains


def test_a_late_rank_is_waited_for(trained):
    for key, weight in weights_of(trained / "mlp" / "whole").items():
        assert torch.equal(weight, weights_of(trained / "late")[key]), key


def test_a_weight_that_is_not_finite_on_one_rank_stops_all(trained):
    first, second = ((trained / "nan" / f"said-{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert re.search(r"(loss became nan at step 13|weight became infinite or nan at step 12); the last good", first)
    name, said = newest(trained / "nan")
    assert name is not None
    assert int(name.removeprefix("step-")) < 12
    # The one that is named was good then; the next may have been under way.
    named = re.search(r"checkpoint/(step-\d+)\.", first)
    assert named is not None
    assert named[1] <= name
    assert (trained / "nan" / "checkpoint" / named[1]).is_dir()
    assert not said


def test_a_full_disk_is_a_warning_and_training_goes_on(trained):
    assert rows_of(trained / "full")[-1]["event"] == "end"
    said = (trained / "full" / "said-0").read_text()
    assert re.search(r"Could not save .*step-\d+: File too large\. Training goes on", said), said
    assert not list((trained / "full").glob("checkpoint/*"))  # what was written in part would fill the disk


# ---------------------------------------------------------------------- damaged files


def newest(run: Path) -> tuple[str | None, list[str]]:
    """The folder that would be loaded, and what is said."""
    from torch_bregman.train.folders import newest_folder

    said: list[str] = []
    folder = newest_folder(run / "checkpoint", ONE_PROCESS, said.append)
    return folder.name if folder else None, said


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("file", ["__0_0.distcp", "__1_0.distcp", ".metadata", "run.pt", "manifest.json"])
def test_a_damaged_file_is_found_and_the_checkpoint_before_is_taken(trained, tmp_path, damage, file):
    run = shutil.copytree(trained / "mlp" / "parts", tmp_path / "run")
    before, last = sorted((run / "checkpoint").iterdir())
    assert newest(run) == (last.name, [])
    damage(last / file)
    name, said = newest(run)
    assert name == before.name
    assert len(said) == 1
    assert f"{last} is damaged" in said[0]
    assert file in said[0] or file == "manifest.json"  # a wrong checksum in it points to another file
    damage(before / file)
    with pytest.raises(RunError, match="damaged"):
        newest(run)


def test_a_folder_without_its_name_is_not_a_checkpoint(trained, tmp_path):
    run = shutil.copytree(trained / "mlp" / "parts", tmp_path / "run")
    before, last = sorted((run / "checkpoint").iterdir())
    last.rename(last.with_name(last.name + ".tmp"))
    assert newest(run) == (before.name, [])


class Evil:
    """Pickled, it writes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_loading_runs_no_code(trained, tmp_path):
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    from torch_bregman.train.folders import SafeReader

    run = shutil.copytree(trained / "mlp" / "parts", tmp_path / "run")
    metadata = sorted((run / "checkpoint").iterdir())[-1] / ".metadata"
    good = pickle.loads(metadata.read_bytes())
    for evil in (Evil(tmp_path / "ran"), {"x": Evil(tmp_path / "ran")}):
        good.planner_data = evil
        metadata.write_bytes(pickle.dumps(good))
        with pytest.raises(RunError, match=r"asks for (posix|nt)\.mkdir"):
            SafeReader(metadata.parent).read_metadata()
    good.planner_data = None
    first = next(iter(good.state_dict_metadata))
    good.state_dict_metadata[first] = BytesStorageMetadata()  # torch would unpickle what such an entry points to
    metadata.write_bytes(pickle.dumps(good))
    with pytest.raises(RunError, match="BytesStorageMetadata"):
        SafeReader(metadata.parent).read_metadata()
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------- under torchrun itself


def job(folder: Path, run: str, fault: str = "", *args: object, restarts: int = 0, epochs: int = 4):
    """The training of digits under torchrun, saving at every chance; see often.py."""
    options = ("--standalone", "--max-restarts", str(restarts), "--monitor-interval", "0.1")
    args = (
        "train",
        "digits",
        "--strategy",
        "ddp",
        "--epochs",
        epochs,
        "--batch-size",
        100,
        "--out",
        run,
        "--quiet",
        *args,
    )
    return torchrun(folder, *args, options=options, module="often", env={"FAULT": fault})


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_the_weights_are_the_same(tmp_path):
    whole, killed = job(tmp_path, "whole"), job(tmp_path, "killed", "kill:30", restarts=1)
    said = outcome(killed)
    assert killed.returncode == 0, said
    assert re.search(r"rank 0: Another rank is gone\. The last good checkpoint stays", said)
    assert "Resumed killed at epoch" in said
    assert not outcome(whole).count("Resumed")
    for key, weight in weights_of(tmp_path / "whole").items():
        assert torch.equal(weight, weights_of(tmp_path / "killed")[key]), key


@pytest.mark.slow
def test_sigterm_for_torchrun_saves_and_says_how_to_go_on(tmp_path):
    process = job(tmp_path, "r", epochs=100_000)
    while not list((tmp_path / "r").glob("checkpoint/step-????????")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = outcome(process)
    assert process.returncode == 1  # torchrun's own
    assert re.search(r"Stopped at epoch \d+, step \d+ of \d+; saved\. Go on with: torchrun .* --resume r", said), said
    assert newest(tmp_path / "r")[0] is not None


@pytest.mark.slow
def test_a_rank_that_is_stopped_ends_all_with_the_documented_code(tmp_path):
    said = outcome(process := job(tmp_path, "r", "stop:20"))
    assert process.returncode == 1
    assert re.search(r"exitcode +: 130", said), said
    assert newest(tmp_path / "r")[0] == "step-00000020"


@pytest.mark.slow
def test_a_rank_that_hangs_is_given_up(tmp_path):
    said = outcome(process := job(tmp_path, "r", "hang:20", "--timeout", 20))
    assert process.returncode == 1
    assert re.search(r"rank 0: Another rank did not answer within the 20 seconds of --timeout\. The last", said), said
    assert newest(tmp_path / "r")[0] is not None
