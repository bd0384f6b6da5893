"""Fixtures: where the real data lie, and a command line in a process of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tests are small, and threads would wait for each other


@pytest.fixture(autouse=True)
def subnormals():
    """Training flushes them for the whole process; the next test starts without that."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the real data sets; skips where there is none."""
    root = Path(os.environ.get("TORCH_BREGMAN_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / "mnist").is_dir():
        pytest.skip(f"no real data in {root}; set TORCH_BREGMAN_DATA to a folder with mnist/ …")
    return root


@pytest.fixture
def command(tmp_path):
    """Run `torch-bregman ARGS` in an empty folder; returns the finished process."""

    def run(*args, timeout=120, **options):
        return subprocess.run(
            [sys.executable, "-m", "torch_bregman.cli", *map(str, args)],
            cwd=tmp_path, capture_output=True, text=True, timeout=timeout,
            env={**os.environ, "COLUMNS": "120", "PYTHONPATH": str(Path(__file__).parents[1] / "src")}, **options,
        )  # fmt: skip

    return run


@pytest.fixture
def inside(tmp_path, monkeypatch, capsys):
    """As `command`, in this process: a fresh one takes seconds to import what it needs."""
    from torch_bregman.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*args):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, args)])
        said = capsys.readouterr()
        return subprocess.CompletedProcess(args, ended.value.code, said.out, said.err)

    return run


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(cls, 5, 20): SIGTERM after these calls of cls.step, for a loop that looks for it in every step."""

    def arm(cls, *steps):
        monkeypatch.setattr("torch_bregman.train.loop.LOOK_EVERY", 0.0)
        original, count = cls.step, [0]

        def step(self):
            original(self)
            count[0] += 1
            if count[0] in steps:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(cls, "step", step)

    return arm
