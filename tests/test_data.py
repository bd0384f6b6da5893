"""Data sets: every format is read right, what is broken is named, the splits never change, the order can be resumed."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import lzma
import os
import re
import struct
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from torch_bregman.data import AUGMENTATIONS, Batches, DataError, Dataset, Split, load, names
from torch_bregman.data import cifar as cifar_module
from torch_bregman.data import idx as idx_module
from torch_bregman.data.splits import hold_out

SHARED = Path(os.environ.get("TORCH_BREGMAN_DATA", Path(__file__).parents[2] / "shared" / "data"))


def need_shared(name: str) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs the folder {name}/ in TORCH_BREGMAN_DATA or in shared/data beside the repository")


def raw_pixels(data: Dataset, split: Split) -> np.ndarray:
    """The pixels 0 to 255 that were normalised."""
    view = (1, -1, *(1,) * (split.x.ndim - 2))
    pixels = split.x.double() * torch.tensor(data.std).view(view) + torch.tensor(data.mean).view(view)
    return (pixels * 255).round().to(torch.uint8).numpy()


def rows(x: np.ndarray) -> list[bytes]:
    return sorted(sample.tobytes() for sample in x)


# Names and arguments


def test_names():
    assert set(names()) == {"digits", "mnist", "fashion-mnist", "cifar10"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("minst", ["`name`", "'minst'", "did you mean 'mnist'", "cifar10", ".npz"]),
        ("CIFAR-10", ["did you mean 'cifar10'"]),
        ("./nowhere/images", ["./nowhere/images", "does not exist"]),
        ("nowhere.npz", ["nowhere.npz", "No such file"]),
        ("???", ["'???'", "expected one of"]),
    ],
)
def test_unknown_names_say_what_is_near(name: str, words: list[str]):
    with pytest.raises(DataError) as caught:
        load(name)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("options", [{"validation": v} for v in (1.0, -1, 1797, True, "a tenth")])
def test_bad_validation_sizes(options: dict):
    with pytest.raises(DataError, match="`validation`: got"):
        load("digits", **options)


@pytest.mark.parametrize("limit", [0, -3, 1.5, True])
def test_bad_limits(limit: object):
    with pytest.raises(DataError, match="`limit`: got"):
        load("digits", limit=limit)


def test_root_must_be_a_folder(tmp_path: Path):
    with pytest.raises(DataError, match="`root`"):
        load("mnist", tmp_path / "absent")


@pytest.mark.parametrize(
    ("module", "name", "package"),
    [("sklearn.datasets", "digits", "scikit-learn"), ("pooch", "mnist", "pooch"), ("PIL", "FOLDER", "pillow")],
)
def test_missing_extras_are_named(monkeypatch, tmp_path: Path, module: str, name: str, package: str):
    if name == "FOLDER":
        name = str(image_folder(tmp_path / "images"))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf'{package}.*pip install "torch-bregman\[train\]"'):
        load(name, cache=tmp_path)


# Splits and normalisation


def test_digits():
    data = load("digits")
    assert data.name == "digits"
    assert data.shape == (1, 8, 8)
    assert data.classes == tuple("0123456789")
    assert data.note == ""
    assert [len(data.train), len(data.validation), len(data.test)] == [1258, 180, 359]
    assert data.train.x.shape == (1258, 1, 8, 8)
    assert data.train.x.dtype == torch.float32
    assert data.train.y.dtype == torch.int64
    assert abs(data.train.x.mean().item()) < 1e-5
    assert data.train.x.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert data.test.x.min().item() == pytest.approx(-data.mean[0] / data.std[0])
    for split in (data.train, data.validation, data.test):  # 174 to 183 images of each digit in all
        assert torch.allclose(split.y.bincount() / len(split), torch.full((10,), 0.1), atol=0.007)


def test_the_split_depends_on_nothing():
    torch.manual_seed(1)
    np.random.seed(1)
    first = load("digits")
    torch.manual_seed(2)
    np.random.seed(2)
    second = load("digits")
    assert torch.equal(first.train.x, second.train.x)
    assert torch.equal(first.test.y, second.test.y)
    # Written down, so that a change of the split, which would make old results incomparable, cannot pass unseen.
    assert first.train.y[:12].tolist() == [8, 0, 0, 8, 0, 2, 9, 3, 0, 7, 3, 5]
    assert first.validation.y[:12].tolist() == [1, 0, 0, 5, 2, 0, 1, 3, 6, 8, 1, 5]
    assert first.test.y[:12].tolist() == [2, 4, 5, 2, 5, 6, 1, 3, 4, 9, 0, 8]


@pytest.mark.parametrize(("validation", "expected"), [(0.2, 359), (300, 300), (0, 0), (0.0, 0), (0.0001, 1)])
def test_validation_sizes(validation: float, expected: int):
    data = load("digits", validation=validation)
    assert len(data.validation) == expected
    assert len(data.test) == 359
    assert len(data.train) == 1797 - 359 - expected


def test_limit_takes_the_first_and_changes_nothing_else():
    whole, small = load("digits"), load("digits", limit=50)
    assert torch.equal(small.train.x, whole.train.x[:50])
    assert torch.equal(small.train.y, whole.train.y[:50])
    assert torch.equal(small.test.x, whole.test.x)
    assert (small.mean, small.std) == (whole.mean, whole.std)
    assert len(load("digits", limit=10**6).train) == 1258


def test_splits_move_between_devices():
    data = load("digits", limit=5).to("meta")
    assert {split.x.device.type for split in (data.train, data.validation, data.test)} == {"meta"}
    assert data.train.y.device.type == "meta"
    assert len(data.train) == 5


@pytest.mark.parametrize("count", [0, 1, 7, 40, 99])
def test_hold_out_is_stratified_and_exact(count: int):
    y = np.repeat([3, 5, 9], [60, 30, 13])
    kept, held = hold_out(y, count, seed=0)
    assert len(held) == count
    assert sorted([*kept, *held]) == list(range(103))
    for label, size in [(3, 60), (5, 30), (9, 13)]:
        assert abs((y[held] == label).sum() - count * size / 103) < 1


@pytest.mark.parametrize("count", [1, 3, 5])
def test_hold_out_leaves_one_sample_of_a_tiny_class(count: int):
    y = np.array([0, 1, 2, 2, 2, 3])
    kept, held = hold_out(y, count, seed=0)
    assert set(y[kept]) == {0, 1, 2, 3}
    assert len(held) == min(count, 2)


# IDX


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def idx_root(root: Path, name: str = "mnist", zipped: bool = True) -> tuple[Path, dict[str, np.ndarray]]:
    """A small data set in IDX files: 40 training and 20 test images of 5 x 4 pixels."""
    random = np.random.RandomState(0)
    (root / name).mkdir(parents=True)
    content = {}
    for kind, size in (("train", 40), ("t10k", 20)):
        content[f"{kind}-images-idx3-ubyte"] = random.randint(0, 256, (size, 5, 4)).astype(np.uint8)
        content[f"{kind}-labels-idx1-ubyte"] = (np.arange(size) % 10).astype(np.uint8)
    for file, array in content.items():
        if zipped:
            (root / name / f"{file}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        else:
            (root / name / file).write_bytes(idx_bytes(array))
    return root, content


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx(tmp_path: Path, name: str, zipped: bool):
    root, content = idx_root(tmp_path, name, zipped)
    data = load(name, root, validation=10)
    assert data.shape == (1, 5, 4)
    assert [len(data.train), len(data.validation), len(data.test)] == [30, 10, 20]
    assert data.train.y.bincount().tolist() == [3] * 10
    assert data.validation.y.bincount().tolist() == [1] * 10
    assert len(data.classes) == 10
    assert np.array_equal(raw_pixels(data, data.test)[:, 0], content["t10k-images-idx3-ubyte"])
    assert data.test.y.tolist() == content["t10k-labels-idx1-ubyte"].tolist()
    both = np.concatenate([raw_pixels(data, data.train), raw_pixels(data, data.validation)])
    assert rows(both[:, 0]) == rows(content["train-images-idx3-ubyte"])
    pixels = raw_pixels(data, data.train) / 255
    assert data.mean[0] == pytest.approx(pixels.mean())
    assert data.std[0] == pytest.approx(pixels.std())
    original = content["train-images-idx3-ubyte"]
    for image, label in zip(raw_pixels(data, data.train)[:, 0], data.train.y.tolist(), strict=True):
        assert label == np.flatnonzero((original == image).all(axis=(1, 2)))[0] % 10  # images keep their labels


GOOD = idx_bytes(np.zeros((40, 5, 4), np.uint8))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("train-images-idx3-ubyte.gz", b"", ["starts with nothing", "00 00 08 03"]),
        ("train-images-idx3-ubyte.gz", b"no gzip at all", ["not readable", "[Gg]zip"]),
        ("train-images-idx3-ubyte.gz", gzip.compress(GOOD)[:-20], ["not readable"]),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(GOOD, 1)[:25] + b"\xff\xff" + gzip.compress(GOOD, 1)[27:],
            ["not"],
        ),
        ("train-images-idx3-ubyte.gz", gzip.compress(GOOD[:-1]), ["799 bytes", r"\[40, 5, 4\]", "expected 800"]),
        ("train-images-idx3-ubyte.gz", gzip.compress(GOOD + b"x"), ["801 bytes", "expected 800"]),
        ("train-images-idx3-ubyte.gz", gzip.compress(GOOD[:10]), ["header of 16 bytes", "after 10"]),
        ("train-images-idx3-ubyte.gz", gzip.compress(b"\0\0\x0d\x03" + GOOD[4:]), ["00 00 0d 03", "00 00 08 03"]),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx_bytes(np.zeros((0, 5, 4), np.uint8))), ["more than none"]),
        ("train-labels-idx1-ubyte.gz", gzip.compress(GOOD), ["00 00 08 03", "1 axes"]),
        ("train-labels-idx1-ubyte.gz", gzip.compress(idx_bytes(np.zeros(39, np.uint8))), ["39 labels", "expected 40"]),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(idx_bytes(np.full(20, 10, np.uint8))), ["label 10", "0 to 9"]),
        (
            "t10k-images-idx3-ubyte.gz",
            gzip.compress(idx_bytes(np.zeros((20, 5, 5), np.uint8))),
            [r"\(5, 5\)", "expected"],
        ),
    ],
    ids=range(13),  # not the bytes, in which gzip writes the time
)
def test_broken_idx_files_are_named(tmp_path: Path, file: str, content: bytes, words: list[str]):
    root, _ = idx_root(tmp_path)
    (root / "mnist" / file).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load("mnist", root, validation=10)
    for word in [re.escape(file), *words]:
        assert re.search(word, str(caught.value)), str(caught.value)


def test_missing_idx_files_are_listed(tmp_path: Path):
    root, _ = idx_root(tmp_path)
    (root / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    (root / "mnist" / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"lacks train-images-idx3-ubyte\.gz, t10k-labels-idx1-ubyte\.gz.*--data-root"):
        load("mnist", root)


@pytest.mark.parametrize(("name", "mean", "std"), [("mnist", 0.1307, 0.3081), ("fashion-mnist", 0.2860, 0.3530)])
def test_the_real_idx_files(name: str, mean: float, std: float):
    need_shared(name)
    for file, md5 in idx_module.HASHES[name].items():
        assert hashlib.md5((SHARED / name / file).read_bytes()).hexdigest() == md5
    data = load(name, SHARED, limit=256)
    assert [len(data.train), len(data.validation), len(data.test)] == [256, 5000, 10_000]
    assert data.shape == (1, 28, 28)
    assert data.mean[0] == pytest.approx(mean, abs=5e-4)  # published for all 60,000
    assert data.std[0] == pytest.approx(std, abs=5e-4)
    assert set(data.train.y.tolist()) == set(range(10))


# Downloads


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """A small MNIST, served on 127.0.0.1 as TORCH_BREGMAN_DATA_URL, with its md5s taken for the known ones."""
    root, _ = idx_root(tmp_path / "mirror")
    files = sorted((root / "mnist").iterdir(), key=lambda path: list(idx_module.HASHES["mnist"]).index(path.name))
    hashes = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in files}
    monkeypatch.setitem(idx_module.HASHES, "mnist", hashes)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("TORCH_BREGMAN_DATA_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield root
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_once(mirror: Path, tmp_path: Path, monkeypatch):
    cache = tmp_path / "cache"
    first = load("mnist", cache=cache, validation=10)
    assert sorted(os.listdir(cache / "mnist")) == sorted(idx_module.HASHES["mnist"])
    assert torch.equal(first.train.x, load("mnist", mirror, validation=10).train.x)
    for path in (mirror / "mnist").iterdir():
        path.unlink()
    assert torch.equal(first.train.x, load("mnist", cache=cache, validation=10).train.x)  # from the cache alone
    assert torch.equal(first.train.x, load("mnist", cache, validation=10).train.x)  # which is a root, too


def test_a_terminal_sees_a_bar(mirror: Path, tmp_path: Path, monkeypatch, capfd):
    load("mnist", cache=tmp_path / "quiet", validation=10)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's word for: take this for a terminal
    load("mnist", cache=tmp_path / "cache", validation=10)
    out, err = capfd.readouterr()
    assert out == ""
    assert all(file in err for file in idx_module.HASHES["mnist"])
    load("mnist", cache=tmp_path / "cache", validation=10)
    assert capfd.readouterr() == ("", "")  # nothing to download, nothing to say


def test_a_broken_cached_file_is_downloaded_again(mirror: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    load("mnist", cache=cache, validation=10)
    broken = cache / "mnist" / "train-images-idx3-ubyte.gz"
    broken.write_bytes(broken.read_bytes()[:-9])
    load("mnist", cache=cache, validation=10)
    assert broken.read_bytes() == (mirror / "mnist" / broken.name).read_bytes()


def test_a_wrong_checksum_leaves_nothing(mirror: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    (mirror / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(GOOD))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz .*wrong checksum.*expected md5 [0-9a-f]{32}"):
        load("mnist", cache=cache, validation=10)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_a_file_missing_on_the_server(mirror: Path, tmp_path: Path):
    (mirror / "mnist" / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"could not download train-images-idx3-ubyte\.gz \(404"):
        load("mnist", cache=tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_offline(monkeypatch, tmp_path: Path, name: str):
    monkeypatch.setenv("TORCH_BREGMAN_DATA_URL", "http://127.0.0.1:9/")  # nobody listens there
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    files = cifar_module.HASHES if name == "cifar10" else idx_module.HASHES[name]
    with pytest.raises(DataError) as caught:
        load(name, cache=tmp_path)
    assert f"--data-root DIR, where DIR/{name}/ holds {', '.join(files)}" in str(caught.value)
    assert f"http://127.0.0.1:9/{name}/{next(iter(files))}" in str(caught.value)


# CIFAR-10


@pytest.fixture
def cifar(monkeypatch) -> dict[str, np.ndarray]:
    """Small CIFAR-10 data: five files and a test file of 20 records."""
    monkeypatch.setattr(cifar_module, "RECORDS", 20)
    random = np.random.RandomState(0)
    y = {
        kind: random.permutation(np.arange(size) % 10).astype(np.uint8) for kind, size in (("train", 100), ("test", 20))
    }
    x = {kind: random.randint(0, 256, (len(y[kind]), 3, 32, 32)).astype(np.uint8) for kind in y}
    return {"x_train": x["train"], "y_train": y["train"], "x_test": x["test"], "y_test": y["test"]}


def records(data: dict[str, np.ndarray]) -> dict[str, bytes]:
    def join(x: np.ndarray, y: np.ndarray) -> bytes:
        return np.concatenate([y[:, None], x.reshape(len(x), -1)], axis=1).tobytes()

    x, y = data["x_train"], data["y_train"]
    files = {f"data_batch_{i + 1}.bin": join(x[20 * i :][:20], y[20 * i :][:20]) for i in range(5)}
    return {**files, "test_batch.bin": join(data["x_test"], data["y_test"])}


def write_folder(folder: Path, data: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True)
    for name, content in records(data).items():
        (folder / name).write_bytes(content)


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_packed(folder: Path, data: dict[str, np.ndarray], approximate: int) -> None:
    def pack(x: np.ndarray) -> bytes:
        red, green, blue = x.transpose(1, 0, 2, 3)
        planes = np.stack([green, red - green, blue - green])
        for axis in (3, 2):
            zero = np.zeros_like(planes.take([0], axis))
            planes = np.diff(planes, axis=axis, prepend=zero)
        return lzma.compress(planes.tobytes())

    folder.mkdir(parents=True)
    (folder / "train_00000-00059.gradxz").write_bytes(pack(data["x_train"][:60]))
    (folder / "train_00060-00099.gradxz").write_bytes(pack(data["x_train"][60:]))
    (folder / "test_00000-00019.gradxz").write_bytes(pack(data["x_test"]))
    labels = {"y_train": data["y_train"], "y_test": data["y_test"], "test_approx_index": np.arange(approximate)}
    np.savez(folder / "labels.npz", **labels)


@pytest.mark.parametrize("layout", ["folder", "bare folder", "archive", "packed"])
def test_cifar_layouts(tmp_path: Path, cifar: dict[str, np.ndarray], layout: str):
    if layout == "archive":
        members = {f"cifar-10-batches-bin/{name}": content for name, content in records(cifar).items()}
        write_archive(tmp_path / "root" / "cifar10" / "cifar-10-binary.tar.gz", members)
    elif layout == "packed":
        write_packed(tmp_path / "root" / "cifar10", cifar, approximate=3)
    else:
        inner = "cifar-10-batches-bin" if layout == "bare folder" else "cifar10/cifar-10-batches-bin"
        write_folder(tmp_path / "root" / inner, cifar)
    data = load("cifar10", tmp_path / "root", cache=tmp_path / "cache", validation=10)
    assert data.shape == (3, 32, 32)
    assert [len(data.train), len(data.validation), len(data.test)] == [90, 10, 20]
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    assert np.array_equal(raw_pixels(data, data.test), cifar["x_test"])
    assert data.test.y.tolist() == cifar["y_test"].tolist()
    both = np.concatenate([raw_pixels(data, data.train), raw_pixels(data, data.validation)])
    assert rows(both) == rows(cifar["x_train"])
    pixels = raw_pixels(data, data.train).transpose(1, 0, 2, 3).reshape(3, -1) / 255
    assert data.mean == pytest.approx(pixels.mean(axis=1).tolist())
    assert data.std == pytest.approx(pixels.std(axis=1).tolist())
    expected = "3 of the 20 test images are approximate (taken from a JPEG copy)." if layout == "packed" else ""
    assert data.note == expected


def test_packed_images_are_decoded_once(tmp_path: Path, cifar: dict[str, np.ndarray], monkeypatch):
    write_packed(tmp_path / "cifar10", cifar, approximate=0)
    cache = tmp_path / "cache"
    first = load("cifar10", tmp_path, cache=cache, validation=10)
    assert first.note == ""
    kept = sorted((cache / "cifar10").iterdir())
    assert [path.suffix for path in kept] == [".npy", ".npy"]  # and no temporary file
    calls = []
    decode = cifar_module.decode
    monkeypatch.setattr(cifar_module, "decode", lambda *given: calls.append(given) or decode(*given))
    assert torch.equal(first.train.x, load("cifar10", tmp_path, cache=cache, validation=10).train.x)
    assert calls == []
    kept[0].write_bytes(kept[0].read_bytes()[:-1])  # a broken one is made again
    assert torch.equal(first.train.x, load("cifar10", tmp_path, cache=cache, validation=10).train.x)
    assert calls
    calls.clear()
    load("cifar10", tmp_path, cache=cache, validation=10)
    assert calls == []


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, cifar: dict[str, np.ndarray]):
    write_packed(tmp_path / "cifar10", cifar, approximate=0)
    (tmp_path / "file").write_text("")
    data = load("cifar10", tmp_path, cache=tmp_path / "file", validation=10)
    assert np.array_equal(raw_pixels(data, data.test), cifar["x_test"])


def test_other_members_of_an_archive_are_left_alone(tmp_path: Path, cifar: dict[str, np.ndarray]):
    members = {f"cifar-10-batches-bin/{name}": content for name, content in records(cifar).items()}
    members |= {"../../evil.bin": b"evil", "elsewhere/test_batch.bin": b"short"}
    write_archive(tmp_path / "root" / "cifar10" / "cifar-10-binary.tar.gz", members)
    before = sorted(tmp_path.rglob("*"))
    load("cifar10", tmp_path / "root", cache=tmp_path / "cache", validation=10)
    assert sorted(tmp_path.rglob("*")) == before


def break_cifar(kind: str, root: Path, data: dict[str, np.ndarray]) -> None:
    folder, archive = root / "cifar10" / "cifar-10-batches-bin", root / "cifar10" / "cifar-10-binary.tar.gz"
    members = {f"cifar-10-batches-bin/{name}": content for name, content in records(data).items()}
    if kind.startswith("archive"):
        if kind == "archive lacks":
            del members["cifar-10-batches-bin/data_batch_2.bin"]
        elif kind == "archive short member":
            members["cifar-10-batches-bin/data_batch_2.bin"] = b"short"
        write_archive(archive, members)
        if kind == "archive truncated":
            archive.write_bytes(archive.read_bytes()[:-1000])
        elif kind == "archive garbage":
            archive.write_bytes(b"garbage")
    elif kind.startswith("packed"):
        write_packed(root / "cifar10", data, approximate=0)
        part = root / "cifar10" / "test_00000-00019.gradxz"
        if kind == "packed truncated":
            part.write_bytes(part.read_bytes()[:-1000])
        elif kind == "packed lacks":
            part.unlink()
        elif kind == "packed labels":
            np.savez(
                root / "cifar10" / "labels.npz", y_train=data["y_train"], y_test=data["y_train"], test_approx_index=[]
            )
        elif kind == "packed pickle":
            np.savez(root / "cifar10" / "labels.npz", y_train=np.array([{}]), y_test=[1], test_approx_index=[])
    elif kind.startswith("folder"):
        write_folder(folder, data)
        if kind == "folder lacks":
            (folder / "data_batch_2.bin").unlink()
        elif kind == "folder truncated":
            (folder / "data_batch_2.bin").write_bytes(members["cifar-10-batches-bin/data_batch_2.bin"][:-3073])
        elif kind == "folder labels":
            (folder / "data_batch_2.bin").write_bytes(b"\x0a" + members["cifar-10-batches-bin/data_batch_2.bin"][1:])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nothing", ["cifar-10-batches-bin/", "test_batch.bin", "cifar-10-binary.tar.gz", "--data-root"]),
        ("archive lacks", ["cifar-10-binary.tar.gz", "lacks", "data_batch_2.bin"]),
        ("archive short member", ["data_batch_2.bin", "5 bytes", "expected 61,460"]),
        ("archive truncated", ["cifar-10-binary.tar.gz", "not readable"]),
        ("archive garbage", ["cifar-10-binary.tar.gz", "not readable"]),
        ("packed truncated", ["test_00000-00019.gradxz", "not readable"]),
        ("packed lacks", ["test_*.gradxz"]),
        ("packed labels", ["labels.npz", "y_test", "[100]", "expected [20]"]),
        ("packed pickle", ["labels.npz", "not readable"]),
        ("folder lacks", ["lacks data_batch_2.bin"]),
        ("folder truncated", ["data_batch_2.bin", "58,387 bytes", "expected 61,460"]),
        ("folder labels", ["data_batch_2.bin", "label 10", "0 to 9"]),
    ],
)
def test_broken_cifar_files_are_named(tmp_path: Path, cifar: dict[str, np.ndarray], kind: str, words: list[str]):
    break_cifar(kind, tmp_path, cifar)
    with pytest.raises(DataError) as caught:
        load("cifar10", tmp_path, cache=tmp_path / "cache", validation=10)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.slow
def test_the_real_cifar10(tmp_path: Path):
    need_shared("cifar10")
    data = load("cifar10", SHARED, cache=tmp_path)
    assert [len(data.train), len(data.validation), len(data.test)] == [45_000, 5000, 10_000]
    assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=1e-3)  # published for all 50,000
    assert data.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=1e-3)
    assert data.train.y.bincount().tolist() == [4500] * 10
    assert data.test.y[:6].tolist() == [3, 8, 8, 0, 6, 6]
    assert "20 of the 10,000 test images are approximate" in data.note


# Arrays

RANDOM = np.random.RandomState(0)
X = RANDOM.randn(40, 6)
Y = np.arange(40) % 4


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ((6,), (6,)),
        ((5, 7), (1, 5, 7)),
        ((5, 7, 3), (3, 5, 7)),
        ((3, 5, 7), (3, 5, 7)),
        ((16, 5, 7), (16, 5, 7)),
        ((3, 5, 3), (3, 5, 3)),  # could be either: taken as channels first, as in torch
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float64"])
def test_npz_layouts(tmp_path: Path, given: tuple[int, ...], shape: tuple[int, ...], dtype: str):
    x = RANDOM.randint(0, 256, (40, *given)).astype(dtype)
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=Y, x_test=x, y_test=Y)
    data = load(str(tmp_path / "mine.npz"))
    assert data.name == "mine"
    assert data.shape == shape
    assert [len(data.train), len(data.validation), len(data.test)] == [36, 4, 40]
    scale = 1 if dtype == "uint8" else 255
    expected = np.moveaxis(x, 3, 1) if given == (5, 7, 3) else x
    assert np.array_equal(
        raw_pixels(data, data.test).astype(int), (expected.astype(int) * scale % 256).reshape(40, *shape)
    )
    assert torch.allclose(data.train.x.mean(dim=(0, *range(2, data.train.x.ndim))), torch.zeros(shape[0]), atol=1e-5)


def test_npz_splits(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    whole = load(str(tmp_path / "a.npz"))
    assert [len(whole.train), len(whole.validation), len(whole.test)] == [28, 4, 8]
    assert whole.test.y.bincount().tolist() == [2] * 4
    np.savez_compressed(tmp_path / "b.npz", x_train=X, y_train=Y, x_val=X[:3], y_val=Y[:3], x_test=X[:9], y_test=Y[:9])
    given = load(str(tmp_path / "b.npz"))
    assert [len(given.train), len(given.validation), len(given.test)] == [40, 3, 9]
    assert torch.allclose(
        given.validation.x.double() * torch.tensor(given.std) + torch.tensor(given.mean), torch.tensor(X[:3]), atol=1e-5
    )
    with pytest.raises(DataError, match=r"`validation`: got 0\.2.*its own validation"):
        load(str(tmp_path / "b.npz"), validation=0.2)


@pytest.mark.parametrize(
    "kinds",
    [
        ("x_train", "y_train", "x_valid", "y_valid", "x_test", "y_test"),
        ("X_train", "Y_train", "X_dev", "Y_dev", "X_Test", "Y_Test"),
        ("train_images", "train_labels", "validation_images", "validation_labels", "test_images", "test_labels"),
        ("data", "target", "val.data", "val.target", "Test-data", "Test-target"),
    ],
)
def test_near_names_are_read_where_they_are_certain(tmp_path: Path, kinds: tuple[str, ...]):
    parts = [X, Y, X[:3], Y[:3, None], X[:9], Y[:9]]  # labels in a column, as MedMNIST has them
    np.savez(tmp_path / "a.npz", **dict(zip(kinds, parts, strict=True)), ids=Y, x_mean=X[0], names=np.array(["a"]))
    data = load(str(tmp_path / "a.npz"))
    assert [len(data.train), len(data.validation), len(data.test)] == [40, 3, 9]
    assert data.note == "not read from a: ids, x_mean, names"


@pytest.mark.parametrize(
    ("given", "first"),
    [((8, 8, 13), (13, 8, 8)), ((13, 8, 8), (13, 8, 8)), ((5, 9, 8), (5, 9, 8)), ((2, 9, 8), (2, 9, 8))],
)
def test_many_channels_are_told_by_the_sides(tmp_path: Path, given: tuple[int, ...], first: tuple[int, ...]):
    x = RANDOM.rand(40, *given)
    np.savez(tmp_path / "a.npz", x=x, y=Y)
    data = load(str(tmp_path / "a.npz"))
    assert data.shape == first
    assert not data.note
    np.savez(tmp_path / "b.npz", x=x, y=Y, channels="last")
    assert load(str(tmp_path / "b.npz")).shape == (given[2], *given[:2])


def test_what_no_rule_tells_is_said(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=RANDOM.rand(40, 16, 5, 7), y=Y)
    data = load(str(tmp_path / "a.npz"))
    assert data.shape == (16, 5, 7)
    assert "16 × 5 × 7 is taken as 16 channels" in data.note


@pytest.mark.parametrize(
    ("dtype", "largest", "unit"), [("int64", 255, 255), ("int32", 9, 255), ("uint16", 65535, 65535), ("bool", 1, 1)]
)
def test_pixels_of_any_type_of_number(tmp_path: Path, dtype: str, largest: int, unit: int):
    x = RANDOM.randint(0, largest + 1, (40, 5, 7)).astype(dtype)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=Y, x_test=x // 2 if dtype != "bool" else x, y_test=Y)
    data = load(str(tmp_path / "a.npz"))
    assert data.mean[0] == pytest.approx(x[: len(x)].mean() / unit, rel=0.1)
    test = data.raw(data.test.x)
    assert torch.allclose(test[:, 0].double(), torch.tensor((x // 2 if dtype != "bool" else x) / unit), atol=1e-5)


def test_tables_of_whole_numbers(tmp_path: Path):
    x = RANDOM.randint(-500, 500, (40, 6))
    np.savez(tmp_path / "whole.npz", x=x, y=Y % 2 == 0)
    np.savez(tmp_path / "float.npz", x=x.astype(float), y=Y % 2 == 0)
    whole, floating = (load(str(tmp_path / f"{name}.npz")) for name in ("whole", "float"))
    assert torch.equal(whole.train.x, floating.train.x)
    assert whole.classes == ("0", "1")


def test_npz_labels_become_positions(tmp_path: Path):
    np.savez(
        tmp_path / "a.npz", x_train=X, y_train=np.array([7, 20, 100, 300])[Y], x_test=X[:4], y_test=[300, 7, 100, 20]
    )
    data = load(str(tmp_path / "a.npz"))
    assert data.classes == ("7", "20", "100", "300")
    assert data.test.y.tolist() == [3, 0, 2, 1]


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7e8])
def test_constant_features_are_harmless(tmp_path: Path, value: float):
    x = X.copy()
    x[:, 2] = value
    np.savez(tmp_path / "a.npz", x=x, y=Y)
    data = load(str(tmp_path / "a.npz"))
    assert data.std[2] == 1
    for split in (data.train, data.validation, data.test):
        assert split.x.isfinite().all()
        assert split.x[:, 2].abs().max() < 1e-5


def test_large_offsets_keep_their_digits(tmp_path: Path):
    np.savez(tmp_path / "shifted.npz", x=X + 1e6, y=Y)  # float32 would round this to sixteenths
    np.savez(tmp_path / "plain.npz", x=X, y=Y)
    shifted, plain = (load(str(tmp_path / f"{name}.npz")) for name in ("shifted", "plain"))
    assert torch.allclose(shifted.train.x, plain.train.x, atol=1e-5)


def test_tiny_data(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=X[:6], y=[0, 0, 0, 0, 1, 2])
    data = load(str(tmp_path / "a.npz"))
    assert [len(data.train), len(data.validation), len(data.test)] == [4, 1, 1]
    assert set(data.train.y.tolist()) == {0, 1, 2}
    np.savez(tmp_path / "b.npz", x=X[:3], y=[0, 1, 2])
    with pytest.raises(DataError, match="3 samples in 3 classes leave none for the test split"):
        load(str(tmp_path / "b.npz"))


NAN = X.copy()
NAN[17, 3] = np.nan


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x_trian": X, "y_train": Y}, ["lacks x_train"]),
        ({"a": X}, ["holds a;", "x_train and y_train"]),
        ({"xtrain": X}, ["xtrain for x_train?"]),
        ({}, ["nothing"]),
        ({"x": X}, ["lacks y"]),
        ({"x_train": X, "y_train": Y, "x_test": X}, ["lacks y_test"]),
        ({"x": X, "y": Y[:39]}, ["y has 39 labels", "expected 40"]),
        ({"x": X, "y": Y + 0.5}, ["y has float64 [40]", "expected integers"]),
        ({"x": X, "y": np.eye(4)[Y].astype(int)}, ["y has int64 [40, 4]"]),
        ({"x": X, "y": Y - 1}, ["label -1"]),
        ({"x": X, "y": Y * 0}, ["only the label 0", "two classes"]),
        ({"x": X.astype(complex), "y": Y}, ["x has complex128"]),
        ({"x": X, "y": Y.astype(float)}, ["y has float64", "y.astype(int)"]),
        ({"x_train": X, "y_train": Y, "x_test": X, "y_test": Y + 1}, ["y_test holds the label 4", "y_train, 0 to 3"]),
        ({"x_train": X, "y_train": Y, "x_test": X > 0, "y_test": Y}, ["x_test has bool", "float64"]),
        ({"x_train": X, "y_train": Y, "X_train": X}, ["holds x_train and X_train", "one of them"]),
        ({"x_train": X, "y_train": Y, "x_tset": X, "y_tset": Y}, ["holds x_tset, y_tset (x_test?)"]),
        ({"x_train": X, "y_train": Y, "x_eval": X}, ["holds x_eval (x_val?) beside x_train"]),
        ({"Xtrain": X, "Ytrain": Y}, ["Xtrain for x_train?"]),
        ({"x": np.zeros((40, 9, 8, 6)), "y": Y}, ["[40, 9, 8, 6]", "either 9 or 6", "channels='last'"]),
        ({"x": np.zeros((40, 9, 8, 6)), "y": Y, "channels": "lats"}, ["`channels` is lats", "'first' or 'last'"]),
        ({"x": X[:, 0], "y": Y}, ["x has float64 [40]", "[N, F]"]),
        ({"x": X[:0], "y": Y[:0]}, ["[0, 6]", "not empty"]),
        ({"x": X.reshape(40, 1, 1, 1, 6), "y": Y}, ["[40, 1, 1, 1, 6]"]),
        ({"x": NAN, "y": Y}, ["x[17] holds nan", "finite"]),
        ({"x": X * np.inf, "y": Y}, ["inf", "finite"]),
        ({"x": X + 1e39, "y": Y}, ["x[0] holds 1e+39", "float32"]),
        ({"x_train": X, "y_train": Y, "x_test": X[:, :5], "y_test": Y}, ["x_test has float64 [40, 5]", "[40, 6]"]),
        ({"x_train": X, "y_train": Y, "x_test": X.astype(np.uint8), "y_test": Y}, ["x_test has uint8", "float64"]),
        ({"x": np.array([{}] * 40), "y": Y}, ["bad.npz: x", "not readable", "plain number arrays"]),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # NumPy's, in making the table
def test_bad_arrays_are_named(tmp_path: Path, arrays: dict[str, np.ndarray], words: list[str]):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError) as caught:
        load(str(tmp_path / "bad.npz"))
    assert all(word in str(caught.value) for word in ["bad.npz", *words]), str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "npy", "flipped"])
def test_corrupt_npz_files_are_named(tmp_path: Path, damage: str):
    path = tmp_path / "bad.npz"
    np.savez(path, x=X, y=Y)
    content = bytearray(path.read_bytes())
    if damage == "npy":
        with path.open("wb") as file:
            np.save(file, X)
    else:
        content[400] ^= 255
        path.write_bytes({"truncated": content[:-50], "garbage": b"abc", "empty": b"", "flipped": content}[damage])
    with pytest.raises(DataError, match=r"bad\.npz.*not readable"):
        load(str(path))


def ragged() -> dict[str, object]:
    return {"x": [[1, 2], [3]], "y": [0, 1]}


def of_a_graph() -> dict[str, object]:
    return {"x": torch.ones(4, 2, requires_grad=True), "y": [0, 1, 0, 1]}


@pytest.mark.parametrize("name", ["ragged", "of_a_graph"])
def test_what_makes_no_array_is_named(name: str):
    with pytest.raises(DataError, match=f"test_data:{name}: x is (list|Tensor), which makes no array"):
        load(f"test_data:{name}")


# Image folders


def image_folder(root: Path, mode: str = "L", size: tuple[int, int] = (6, 4), count: int = 10) -> Path:
    """Images of the classes cat and dog, `count` of each, in colours that tell which is which."""
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for k in range(count):
            image = Image.new("RGB", size, (k, 100 + k, 200 * label))
            image.convert(mode).save(root / name / f"{k:02d}.png")
    return root


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("1", 1)])
def test_image_folder(tmp_path: Path, mode: str, channels: int):
    folder = image_folder(tmp_path / "animals", mode)
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / "cat" / ".hidden.png").write_text("not an image")
    data = load(str(folder))
    assert data.name == "animals"
    assert data.shape == (channels, 4, 6)
    assert data.classes == ("cat", "dog")
    assert [len(data.train), len(data.validation), len(data.test)] == [14, 2, 4]
    assert data.test.y.tolist() == [0, 0, 1, 1]
    assert torch.equal(data.train.x, load(str(folder)).train.x)
    if channels == 3 and mode != "P":
        pixels = raw_pixels(data, data.train)
        assert np.array_equal(pixels[:, 2, 0, 0], 200 * data.train.y.numpy())
        assert np.array_equal(pixels[:, 1, 0, 0], 100 + pixels[:, 0, 3, 5])


def test_image_folder_with_its_own_splits(tmp_path: Path):
    folder = tmp_path / "animals"
    image_folder(folder / "train", count=5)
    image_folder(folder / "val", count=2)
    image_folder(folder / "test", count=3)
    data = load(str(folder))
    assert [len(data.train), len(data.validation), len(data.test)] == [10, 4, 6]
    assert data.test.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert set(load(str(folder), limit=4).train.y.tolist()) == {0, 1}  # though the files are sorted by class


def test_grey_and_colour_together_are_colour(tmp_path: Path):
    folder = image_folder(tmp_path / "animals")
    Image.new("RGB", (6, 4), (10, 20, 30)).save(folder / "dog" / "99.jpg")
    assert load(str(folder)).shape == (3, 4, 6)


@pytest.mark.parametrize("suffix", ["bmp", "webp", "tif", "TIFF", "gif", "jpe", "ppm", "tga", "jp2"])
def test_every_format_is_read(tmp_path: Path, suffix: str):
    folder = image_folder(tmp_path / "animals")
    Image.new("L", (6, 4), 200).save(folder / "dog" / f"99.{suffix}")
    data = load(str(folder))
    assert len(data.train) + len(data.validation) + len(data.test) == 21
    assert not data.note


def test_what_is_left_out_and_what_lies_deeper_is_told(tmp_path: Path):
    folder = image_folder(tmp_path / "animals")
    (folder / "dog" / "old" / "1990").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("L", (6, 4)).save(folder / "dog" / "old" / "1990" / name)
    for name in ("dog/old/notes.txt", "cat/a.heic", "cat/b.heic", "labels.csv"):
        (folder / name).write_text("")
    frames = [Image.new("L", (6, 4), k) for k in range(3)]
    frames[0].save(folder / "cat" / "move.gif", save_all=True, append_images=frames[1:])
    (folder / "dog" / "old" / "back").symlink_to(folder / "dog")
    data = load(str(folder))
    assert len(data.train) + len(data.validation) + len(data.test) == 23
    for said in (
        "left out of animals/: 1 .csv", "left out of cat/: 2 .heic", "left out of dog/: 1 .txt",
        "images of dog/old/1990/ (2) count for the class dog", "move.gif the first frame alone",
    ):  # fmt: skip
        assert said in data.note


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_turns_an_image_upright(tmp_path: Path, suffix: str, orientation: int):
    folder = image_folder(tmp_path / "animals", "RGB", (16, 8))
    upright = Image.new("RGB", (16, 8))
    upright.paste((255, 255, 255), (0, 0, 8, 8))  # white on the left
    turn = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = upright if turn[orientation] is None else upright.transpose(turn[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    (folder / "test").mkdir()
    for name in ("train/cat", "train/dog"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name.partition("/")[2]).rename(folder / name)
    (folder / "test" / "cat").mkdir()
    stored.save(folder / "test" / "cat" / f"a.{suffix}", exif=exif)
    data = load(str(folder))
    pixels = raw_pixels(data, data.test)[0, 0]
    assert pixels.shape == (8, 16)
    assert pixels[:, :7].min() > 200
    assert pixels[:, 9:].max() < 55


def test_folders_of_splits_under_near_names(tmp_path: Path):
    folder = tmp_path / "animals"
    for name, count in (("Training", 5), ("valid", 2), ("testing", 3)):
        image_folder(folder / name, count=count)
    data = load(str(folder))
    assert [len(data.train), len(data.validation), len(data.test)] == [10, 4, 6]
    plain = image_folder(tmp_path / "passes")
    (plain / "cat").rename(plain / "valid")
    (plain / "dog").rename(plain / "expired")
    assert load(str(plain)).classes == ("expired", "valid")


def break_folder(kind: str, folder: Path) -> None:
    image_folder(folder)
    if kind == "size":
        Image.new("L", (5, 4)).save(folder / "dog" / "03.png")
    elif kind == "no image":
        (folder / "dog" / "03.png").write_bytes(b"no image")
    elif kind == "truncated":
        image = Image.fromarray(RANDOM.randint(0, 256, (4, 6)).astype(np.uint8))
        image.save(folder / "dog" / "03.png")
        content = (folder / "dog" / "03.png").read_bytes()
        (folder / "dog" / "03.png").write_bytes(content[:50])
    elif kind == "deep":
        Image.fromarray(np.zeros((4, 6), np.uint16)).save(folder / "dog" / "03.png")
    elif kind == "empty class":
        (folder / "emu").mkdir()
    elif kind == "no train":
        (folder / "cat").rename(folder / "test")
    elif kind == "other":
        image_folder(folder / "train")
    elif kind == "split inside":
        image_folder(folder / "dog" / "test")
    elif kind == "two names":
        for name in ("train", "val", "valid"):
            image_folder(folder / name)
        for name in ("cat", "dog"):
            (folder / name).rename(folder.parent / name)
    elif kind == "heic":
        (folder / "emu").mkdir()
        (folder / "emu" / "a.heic").write_bytes(b"")
    elif kind == "one class":
        (folder / "dog").rename(folder.parent / "dog")
    elif kind == "unknown class":
        image_folder(folder / "train")
        for name in ("cat", "dog"):
            (folder / name).rename(folder.parent / name)
        image_folder(folder / "test")
        (folder / "test" / "dog").rename(folder / "test" / "emu")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("size", ["03.png", "5 x 4", "6 x 4"]),
        ("no image", ["03.png", "not readable"]),
        ("truncated", ["03.png", "not readable"]),
        ("deep", ["03.png", "more than 8 bits"]),
        ("empty class", ["emu", "no images"]),
        ("no train", ["has test/ but no train/"]),
        ("other", ["has cat/ beside train/"]),
        ("split inside", ["dog/test", "test/dog/", "outside the classes"]),
        ("two names", ["val/ and valid/", "one of them"]),
        ("heic", ["emu: holds no images", "left out of emu/: 1 .heic"]),
        ("one class", ["1 class folders", "at least two"]),
        ("unknown class", ["'emu'", "cat, dog"]),
    ],
)
def test_bad_image_folders_are_named(tmp_path: Path, kind: str, words: list[str]):
    break_folder(kind, tmp_path / "animals")
    with pytest.raises(DataError) as caught:
        load(str(tmp_path / "animals"))
    assert all(word in str(caught.value) for word in words), str(caught.value)


# Batches


def numbered(count: int, shape: tuple[int, ...] = (1, 2, 2)) -> Split:
    """A split whose i-th sample and label are i."""
    y = torch.arange(count)
    return Split(y.float().view(-1, *(1,) * len(shape)).expand(-1, *shape).contiguous(), y)


def labels(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> list[int]:
    return [i for _, y in batches for i in y.tolist()]


@pytest.mark.parametrize(("count", "size", "drop", "expected"), [(10, 4, False, 3), (10, 4, True, 2), (8, 4, False, 2)])
@pytest.mark.parametrize("seed", [None, 0])
def test_batches_cover_the_split(count: int, size: int, drop: bool, expected: int, seed: int | None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batches = Batches(numbered(count), size, generator=generator, drop_last=drop)
    got = list(batches)
    assert len(got) == len(batches) == expected
    assert all(torch.equal(x[:, 0, 0, 0].long(), y) for x, y in got)
    assert all(len(y) == size for _, y in got[: count // size])
    seen = labels(iter(got))
    assert len(set(seen)) == len(seen) == (count // size * size if drop else count)
    if seed is None:
        assert seen == list(range(len(seen)))


@pytest.mark.parametrize(
    ("count", "size", "least", "sizes"),
    [(9, 4, 2, [4, 5]), (10, 4, 2, [4, 4, 2]), (10, 4, 3, [4, 6]), (8, 4, 4, [4, 4]), (1, 4, 2, [1]), (3, 4, 2, [3])],
)
@pytest.mark.parametrize("seed", [None, 0])
def test_too_few_samples_join_the_batch_before(count: int, size: int, least: int, sizes: list[int], seed: int | None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batches = Batches(numbered(count), size, generator=generator, least=least)
    for skip in range(len(sizes) + 1):
        start = None if generator is None else generator.get_state()
        assert [len(y) for _, y in batches.epoch(skip)] == sizes[skip:]
        if generator is not None:
            generator.set_state(start)
    assert len(batches) == len(sizes)
    assert sorted(labels(batches)) == list(range(count))


def test_an_epoch_is_one_permutation():
    batches = Batches(numbered(100), 7, generator=torch.Generator().manual_seed(5))
    reference = torch.Generator().manual_seed(5)
    for _ in range(3):
        assert labels(iter(batches)) == torch.randperm(100, generator=reference).tolist()


@pytest.mark.parametrize("augment", [None, "shift", "crop-flip"])
@pytest.mark.parametrize("skip", [0, 1, 5, 13])
def test_an_epoch_can_be_resumed(augment: str | None, skip: int):
    split = Split(torch.randn(100, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(100))
    generator = torch.Generator().manual_seed(3)
    batches = Batches(split, 8, generator=generator, augment=AUGMENTATIONS[augment] if augment else None)
    list(batches)
    state = generator.get_state()
    whole, following = list(batches), list(batches)
    generator.set_state(state)
    resumed = list(batches.epoch(skip))
    assert len(resumed) == 13 - skip
    for (x, y), (x_whole, y_whole) in zip(resumed + list(batches), whole[skip:] + following, strict=True):
        assert torch.equal(x, x_whole)
        assert torch.equal(y, y_whole)


def test_the_order_is_drawn_when_the_epoch_is_asked_for():
    generator = torch.Generator().manual_seed(0)
    batches = Batches(numbered(20), 4, generator=generator)
    epoch = batches.epoch()
    generator.manual_seed(99)  # too late to matter
    assert labels(epoch) == torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()


def test_every_batch_is_augmented_anew():
    split = Split(torch.randn(1, 1, 8, 8).expand(64, 1, 8, 8).contiguous(), torch.zeros(64, dtype=torch.int64))
    batches = Batches(split, 16, generator=torch.Generator().manual_seed(0), augment=AUGMENTATIONS["crop-flip"])
    seen = [x for _ in range(2) for x, _ in batches]
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.gpu
@pytest.mark.parametrize("augment", [None, "crop-flip"])
def test_batches_on_a_gpu(augment: str | None):
    split = load("digits").train
    function = AUGMENTATIONS[augment] if augment else None
    here, there = (
        Batches(given, 64, generator=torch.Generator().manual_seed(0), augment=function)
        for given in (split, split.to("cuda"))
    )
    for (x, y), (x_gpu, y_gpu) in zip(here, there, strict=True):
        assert x_gpu.device.type == y_gpu.device.type == "cuda"
        assert torch.equal(y, y_gpu.cpu())  # the same order on either device
        assert augment or torch.equal(x, x_gpu.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_gathered_too(dtype: torch.dtype):
    split = numbered(20)
    x, y = next(iter(Batches(Split(split.x.to(dtype), split.y), 4, generator=torch.Generator().manual_seed(0))))
    assert x.dtype == dtype
    assert x[:, 0, 0, 0].long().tolist() == y.tolist()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, "`batch_size`: got 0"),
        ({"batch_size": 2.0}, "`batch_size`: got 2.0"),
        ({"batch_size": 11, "drop_last": True}, "`drop_last`"),
        ({"batch_size": 2, "augment": AUGMENTATIONS["shift"]}, "`generator`"),
    ],
)
def test_bad_batches(options: dict, match: str):
    with pytest.raises(ValueError, match=match):
        Batches(numbered(10), **options)


@pytest.mark.parametrize("skip", [-1, 6])
def test_bad_skips(skip: int):
    with pytest.raises(ValueError, match=f"`skip`: got {skip}; expected 0 to 5"):
        Batches(numbered(10), 2).epoch(skip)


# Augmentations


@pytest.mark.parametrize(("name", "pad", "flip"), [("crop-flip", 4, True), ("shift", 1, False), ("none", 0, False)])
def test_augmentations_give_windows_of_the_padded_image(name: str, pad: int, flip: bool):
    x = torch.rand(300, 2, 6, 9, generator=torch.Generator().manual_seed(0)) + 1
    black = torch.tensor([-0.5, -1.5])
    x[0, :, 0, 0] = black  # one black pixel in the whole batch
    out = AUGMENTATIONS[name](x, torch.Generator().manual_seed(1))
    padded = black.view(1, 2, 1, 1).repeat(300, 1, 6 + 2 * pad, 9 + 2 * pad)
    padded[:, :, pad : pad + 6, pad : pad + 9] = x
    windows: dict[tuple[int, int, bool], Callable] = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            window = padded[:, :, top : top + 6, left : left + 9]
            windows[top, left, False] = window
            if flip:
                windows[top, left, True] = window.flip(3)
    matches = {key: (out == window).flatten(1).all(1) for key, window in windows.items()}
    assert torch.equal(
        torch.stack(list(matches.values())).sum(0), torch.ones(300, dtype=torch.int64)
    )  # each one window
    used = {key for key, match in matches.items() if match.any()}
    assert {key[0] for key in used} == {key[1] for key in used} == set(range(2 * pad + 1))
    assert {key[2] for key in used} == ({True, False} if flip else {False})
    assert torch.equal(out, AUGMENTATIONS[name](x, torch.Generator().manual_seed(1)))


def test_black_is_what_black_became():
    data = load("digits", limit=128)
    out = AUGMENTATIONS["crop-flip"](data.train.x, torch.Generator().manual_seed(0))
    assert out.min().item() == pytest.approx(-data.mean[0] / data.std[0])
    assert out.min() == data.train.x.min()


def test_augmentations_need_images():
    with pytest.raises(ValueError, match=r"`augment`: got samples of shape \[5\]"):
        AUGMENTATIONS["shift"](torch.zeros(3, 5), torch.Generator())
