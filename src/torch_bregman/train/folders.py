"""Where several ranks save a run: folders that all of them write in the background, and any number can read."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from ..distributed import local
from ..files import write_atomically
from .checksummed import latest_checkpoint
from .errors import RunError
from .ranks import Processes

KEEP = 2  # folders: the newest, and the one before in case it is damaged
Warn = Callable[[str], None]


class Folders:
    """The checkpoints of several ranks: `run`/checkpoint/step-00001200, and so on.

    Weights and optimizer state are written through torch.distributed.checkpoint, each rank its share, so that any
    number of ranks can read them; all else is in run.pt. `save` only copies to the memory of the host: the writing is
    done in the background, one save at a time. A folder has its name once all of it is on the disk, with a manifest of
    checksums. What goes wrong there is a warning, for the checkpoint before is untouched and the next save tries again.
    """

    def __init__(self, run: Path, warn: Warn, ranks: Processes) -> None:
        self.path = run / "checkpoint"
        self.ranks, self.warn = ranks, warn
        self.good: list[Path] = []  # folders known to be whole
        self._group = dist.new_group(backend="gloo")
        self._staged: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: str | None = None

    def __enter__(self) -> Folders:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, RuntimeError):  # then another rank is gone and would be waited for
            self.look(wait=True)

    @property
    def last(self) -> Path | None:
        """The last good checkpoint."""
        return self.good[-1] if self.good else None

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """What was saved last and is undamaged; None where nothing was, RunError where all of it is damaged."""
        saved, folder = latest(self.path.parent, self.ranks, model, optimizer, self.warn)
        self.good = [folder] if folder is not None else []
        return saved

    def save(self, step: int, state: dict[str, Any], *, urgent: bool = False) -> None:
        """Begin to write `state`; unless it is `urgent`, not while the save before still goes on."""
        folder = self.path / f"step-{step:08d}"
        if not urgent and any(self.ranks.any(self._thread is not None and self._thread.is_alive())):
            return
        self.look(wait=True)
        if folder == self.last:  # asked only now, when all ranks give the same answer
            return
        tensors, rest = split(state)
        rest["random"], rest["cuda"] = map(list, zip(*self.ranks.gather((state["random"], state["cuda"])), strict=True))
        content = io.BytesIO()
        if self.ranks.first:
            torch.save(rest, content)  # now, for it will change
            shutil.rmtree(temporary(folder), ignore_errors=True)
        self._stage(tensors)
        self._thread = threading.Thread(target=self._write, args=(folder, step, content.getvalue()), daemon=True)
        self._thread.start()

    def look(self, *, wait: bool = False) -> None:
        """Say how the last save went, if it has ended; or `wait` for its end."""
        if self._thread is None or (self._thread.is_alive() and not wait):
            return
        self._thread.join()
        self._thread = None
        if self._error is not None:
            self.warn(f"{self._error} Training goes on; the checkpoint before is untouched.")
            self._error = None

    def wait(self) -> None:
        """Wait for the last save; RunError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise RunError(f"{self._error} The checkpoint before is untouched.")

    def _stage(self, tensors: dict[str, Tensor]) -> None:
        """Copy to the memory of the host, into that of the last save where it fits."""
        fresh = {}
        for name, tensor in tensors.items():
            old = self._staged.get(name)
            if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
                fresh[name] = tensor.detach().to("cpu", copy=True)
            else:
                local(old).copy_(local(tensor.detach()))
                fresh[name] = old
        self._staged = fresh

    # ------------------------------------------------------------------ in the background, on all ranks at once

    def _write(self, folder: Path, step: int, rest: bytes) -> None:
        """Write the folder; what goes wrong on any rank becomes the `_error` of all."""
        problem, sums = None, {}
        try:
            sums = self._write_files(temporary(folder), rest)
        except (Exception, CheckpointException) as error:
            problem = reason(error)
        try:
            found = self.ranks.gather((problem, sums), self._group)
            problem = next((problem for problem, _ in found if problem is not None), None)
            if self.ranks.first and problem is None:
                try:
                    self._finish(folder, step, {name: value for _, sums in found for name, value in sums.items()})
                except OSError as error:
                    problem = reason(error)
            if self.ranks.first and problem is not None:
                shutil.rmtree(temporary(folder), ignore_errors=True)  # the disk may be full
            problem = self.ranks.gather(problem, self._group)[0]
        except RuntimeError as error:  # another rank is gone, as the training will notice, too
            problem = reason(error)
        if problem is None:
            self.good = [*self.good, folder][-KEEP:]
        else:
            self._error = f"Could not save {folder}: {problem}."

    def _write_files(self, folder: Path, rest: bytes) -> dict[str, str]:
        """Write this rank's files; returns their checksums."""
        save_tensors(dict(self._staged), storage_writer=FileSystemWriter(str(folder)), process_group=self._group)
        mine = [path.name for path in folder.glob(f"__{self.ranks.rank}_*")]
        if self.ranks.first:
            write_atomically(folder / "run.pt", rest)
            mine += [".metadata", "run.pt"]
        return {name: checksum(folder / name) for name in mine}

    def _finish(self, folder: Path, step: int, sums: dict[str, str]) -> None:
        """Write the manifest, give the folder its name and remove old ones."""
        manifest = {"step": step, "world_size": self.ranks.size, "strategy": self.ranks.strategy, "sha256": sums}
        write_atomically(temporary(folder) / "manifest.json", json.dumps(manifest, indent=1).encode())
        if folder.exists():  # a damaged one
            shutil.rmtree(folder)
        os.replace(temporary(folder), folder)
        for old in folders(self.path):
            if old not in [*self.good[1 - KEEP :], folder]:
                shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------------- loading


def latest(
    run: Path, ranks: Processes, model: nn.Module, optimizer: torch.optim.Optimizer, warn: Warn
) -> tuple[dict[str, Any] | None, Path | None]:
    """What was saved last and is undamaged, laid out as `model` is here; and the folder that holds it, if it is one.

    None where nothing was saved yet. Raises RunError where all that was saved is damaged.
    """
    saved = latest_checkpoint(run / "checkpoint.pt", warn)
    folder = newest_folder(run / "checkpoint", ranks, warn)
    if folder is not None:
        rest = torch.load(folder / "run.pt", map_location="cpu", weights_only=True)
        if saved is None or (rest["epoch"], rest["batch"]) > (saved["epoch"], saved["batch"]):
            saved = rest | read_tensors(folder, rest, ranks, model, optimizer)
            for name in ("random", "cuda"):
                saved[name] = rest[name][ranks.rank] if ranks.rank < len(rest[name]) else None
            return saved, folder
    if saved is not None:
        lay_out(saved, ranks, model, optimizer)
        if not ranks.first:  # a rank that is new has random numbers of its own
            saved |= {"random": None, "cuda": None}
    return saved, None


def newest_folder(path: Path, ranks: Processes, warn: Warn) -> Path | None:
    """The newest whole folder; what is damaged is named. All ranks look, each at some of the files, and agree."""
    damaged = None
    for folder in ranks.on_first(lambda: folders(path)[::-1]):
        problems = ranks.gather(damage(folder, ranks.rank, ranks.size))
        problem = next((text for text in problems if text is not None), None)
        if problem is None:
            return folder
        damaged = f"The checkpoint {folder} is damaged ({problem})."
        warn(f"{damaged} Trying the one before.")
    if damaged is not None:
        raise RunError(damaged)
    return None


def folders(path: Path) -> list[Path]:
    """The finished folders, the oldest first."""
    return sorted(folder for folder in path.glob("step-*") if folder.suffix != ".tmp")


def temporary(folder: Path) -> Path:
    """Where `folder` is written."""
    return folder.with_name(folder.name + ".tmp")


def damage(folder: Path, rank: int, size: int) -> str | None:
    """What is wrong with the `rank`-th of `size` shares of the files in the folder."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        sums = sorted(manifest["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json cannot be read"
    if not {".metadata", "run.pt"} <= manifest["sha256"].keys() or folder.name != f"step-{manifest.get('step'):08d}":
        return "manifest.json is not complete"
    for name, expected in sums[rank::size]:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if checksum(folder / name) != expected:
            return f"the checksum of {name} does not fit"
    return None


def checksum(path: Path) -> str:
    """SHA-256 of the file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: BaseException) -> str:
    """Why a save failed, in a few words: that of the system where it is one."""
    chain: list[BaseException] = [error]
    if isinstance(error, CheckpointException):
        chain += [failure for failure, _ in error.failures.values()]
    for one in chain:
        cause: BaseException | None = one
        while cause is not None:
            if isinstance(cause, OSError) and cause.strerror:
                return cause.strerror
            cause = cause.__cause__ or cause.__context__
    return str(chain[-1]).splitlines()[0] or type(chain[-1]).__name__


# ---------------------------------------------------------------------- what is in a folder


def split(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of model and optimizer by name, and all the rest."""
    tensors = {f"model.{name}": value for name, value in state["model"].items()}
    plain: dict[int, dict[str, Any]] = {}
    for i, values in state["optimizer"]["state"].items():
        plain[i] = {}
        for name, value in values.items():
            if isinstance(value, Tensor) and value.dim():
                tensors[f"optimizer.{i}.{name}"] = value
            else:
                plain[i][name] = value
    optimizer = {"state": plain, "param_groups": state["optimizer"]["param_groups"]}
    return tensors, state | {"model": {}, "optimizer": optimizer}


def read_tensors(
    folder: Path, rest: dict[str, Any], ranks: Processes, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The state of model and optimizer from what `split` has made, as this rank holds it."""
    reader = SafeReader(str(folder))
    like = model_and_parameters(model, optimizer)
    tensors: dict[str, Tensor] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        shape, dtype = entry.size, entry.properties.dtype
        owner = like.get(name.rpartition(".")[0] if name.startswith("optimizer.") else name)
        if owner is not None and owner.shape == shape:
            tensors[name] = torch.empty_like(owner, dtype=dtype, requires_grad=False)
        else:
            tensors[name] = torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load_tensors(tensors, storage_reader=reader, no_dist=ranks.size == 1)
    found = {"model": {}, "optimizer": rest["optimizer"]}
    for name, tensor in tensors.items():
        kind, _, key = name.partition(".")
        if kind == "model":
            found["model"][key] = tensor
        else:
            i, _, key = key.partition(".")
            found["optimizer"]["state"][int(i)][key] = tensor
    return found


def lay_out(saved: dict[str, Any], ranks: Processes, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Cut the weights and states of a single process as those of the model are here."""
    if ranks.strategy != "fsdp":
        return
    from torch.distributed.tensor import DTensor, distribute_tensor

    def cut(value: Any, like: Tensor | None) -> Any:
        if isinstance(value, Tensor) and isinstance(like, DTensor) and value.shape == like.shape:
            return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
        return value

    like = model_and_parameters(model, optimizer)
    saved["model"] = {name: cut(value, like.get(f"model.{name}")) for name, value in saved["model"].items()}
    for i, values in saved["optimizer"]["state"].items():
        values.update({name: cut(value, like.get(f"optimizer.{i}")) for name, value in values.items()})


def model_and_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of the model, and the parameters of the optimizer by their number."""
    like = {f"model.{name}": value for name, value in model.state_dict().items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return like | {f"optimizer.{i}": p for i, p in enumerate(parameters)}


ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    """Makes the classes that describe tensors and nothing else: the file may be from anywhere."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise RunError(f"The checkpoint's .metadata asks for {module}.{name}, which no checkpoint of ours does.")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """Reads tensors; nothing in the files is run. RunError where .metadata holds anything else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        # The planner would load what is no tensor with pickle.
        entries = metadata.state_dict_metadata.values()
        if not all(isinstance(entry, TensorStorageMetadata) for entry in entries):
            raise RunError(f"The checkpoint {self.path} holds something that is no tensor.")
        metadata.storage_meta.load_id = self.load_id
        return metadata
