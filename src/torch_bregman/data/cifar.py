"""CIFAR-10: the official binary layout, as a folder or as its archive, and a lossless packed form of it.

Binary: five training files and a test file of 10,000 records, each a label byte and 3 x 32 x 32 bytes (planes R, G, B).
Packed: .gradxz files, xz streams of uint8 [3, N, 32, 32]: planes (G, R-G, B-G) mod 256, each as its 2-D gradient.
"""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np

from torch_bregman.data.download import absent, default_cache, fetch
from torch_bregman.data.errors import DataError
from torch_bregman.data.normalise import Array
from torch_bregman.data.splits import Pair, Raw
from torch_bregman.files import write_atomically

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HOME = "https://www.cs.toronto.edu/~kriz/"
ARCHIVE = "cifar-10-binary.tar.gz"
HASHES = {ARCHIVE: "c32a1d4ab5d03f1284b67883e8d87530"}
FOLDER = "cifar-10-batches-bin"
FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
RECORDS, RECORD = 10_000, 1 + 3 * 32 * 32  # records per file, bytes per record


def read(root: Path | None, cache: Path | None) -> Raw:
    """CIFAR-10 from what lies in `root`, or downloaded to the cache where `root` is None."""
    if root is None:
        return from_files(archive_contents(fetch("cifar10", HOME, HASHES, cache)[0]))
    for folder in (root / "cifar10" / FOLDER, root / FOLDER):
        if folder.is_dir():
            return from_files(folder_contents(folder))
    if (root / "cifar10" / ARCHIVE).is_file():
        return from_files(archive_contents(root / "cifar10" / ARCHIVE))
    if list((root / "cifar10").glob("*.gradxz")):
        return from_packed(root / "cifar10", cache)
    raise absent("cifar10", root, [f"{FOLDER}/ (with {', '.join(FILES)}) or {ARCHIVE}"])


def from_files(contents: dict[str, Array]) -> Raw:
    """The data set in the records of the six files."""
    x, y = zip(*(decode_records(contents[file], file) for file in FILES), strict=True)
    return Raw("cifar10", (np.concatenate(x[:5]), np.concatenate(y[:5])), CLASSES, test=(x[5], y[5]), held_out=5000)


def decode_records(content: Array, file: str) -> Pair:
    """Images [N, 3, 32, 32] and labels [N] of one file's bytes, as views."""
    records = content.reshape(-1, RECORD)
    x, y = records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]
    if y.max() > 9:
        raise DataError(f"{file}: got the label {y.max()}; expected 0 to 9.")
    return x, y


def folder_contents(folder: Path) -> dict[str, Array]:
    """The bytes of the six files in `folder`, mapped, not read."""
    for file in FILES:
        if not (folder / file).is_file():
            raise DataError(f"{folder}: lacks {file}; expected {', '.join(FILES)}.")
        check_size(str(folder / file), (folder / file).stat().st_size)
    return {file: np.memmap(folder / file, np.uint8, mode="r") for file in FILES}


def archive_contents(path: Path) -> dict[str, Array]:
    """The bytes of the six files in the archive `path`. Nothing is extracted to disk, and no other member is read."""
    contents = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                place = PurePosixPath(member.name)
                if not (member.isreg() and place.name in FILES and place.parent.name == FOLDER):
                    continue
                check_size(f"{path}: {place.name}", member.size)
                if (stream := archive.extractfile(member)) is not None:
                    contents[place.name] = np.frombuffer(stream.read(), np.uint8)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: not readable ({error}); expected the official gzipped archive.") from error
    if missing := [file for file in FILES if file not in contents]:
        raise DataError(f"{path}: lacks {FOLDER}/ {', '.join(missing)}.")
    return contents


def check_size(file: str, size: int) -> None:
    if size != RECORDS * RECORD:
        raise DataError(
            f"{file}: holds {size:,} bytes; expected {RECORDS * RECORD:,}, {RECORDS:,} records of {RECORD:,}."
        )


def from_packed(folder: Path, cache: Path | None) -> Raw:
    """The data set in the packed parts in `folder`. Decoding takes 10 s, so the images are kept in the cache."""
    parts = {kind: sorted(folder.glob(f"{kind}_*.gradxz")) for kind in ("train", "test")}
    path = folder / "labels.npz"
    if missing := [f"{kind}_*.gradxz" for kind in parts if not parts[kind]]:
        raise DataError(f"{folder}: lacks {' and '.join(missing)}; expected the packed parts of both splits.")
    try:
        with np.load(path, allow_pickle=False) as file:
            labels = {kind: file[f"y_{kind}"] for kind in parts}
            approximate = len(file["test_approx_index"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not readable ({error}); expected y_train, y_test and test_approx_index.") from error
    note = f"{approximate} of the {len(labels['test']):,} test images are approximate (taken from a JPEG copy)."
    pairs = {}
    for kind in parts:
        x, y = packed_images(parts[kind], cache), labels[kind]
        if y.shape != (len(x),) or y.dtype.kind not in "iu" or not len(y) or y.min() < 0 or y.max() > 9:
            raise DataError(f"{path}: y_{kind} is {y.dtype} {list(y.shape)}; expected [{len(x)}] with labels 0 to 9.")
        pairs[kind] = x, y
    return Raw("cifar10", pairs["train"], CLASSES, test=pairs["test"], held_out=5000, note=note if approximate else "")


def packed_images(parts: list[Path], cache: Path | None) -> Array:
    """Images [N, 3, 32, 32] of all `parts`: from the cache, or decoded and put there under a name made of their md5."""
    packed = [part.read_bytes() for part in parts]
    md5 = hashlib.md5(usedforsecurity=False)
    for content in packed:
        md5.update(content)
    target = (cache or default_cache()) / "cifar10" / f"packed-{md5.hexdigest()}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # absent or broken: decode again
        return np.load(target, mmap_mode="r", allow_pickle=False)
    images = np.concatenate([decode(content, part) for content, part in zip(packed, parts, strict=True)])
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, lambda file: np.save(file, images, allow_pickle=False), shared=True)
    return images


def decode(content: bytes, part: Path) -> Array:
    """Images uint8 [N, 3, 32, 32], planes R, G, B, of one packed part."""
    try:
        residual = np.frombuffer(lzma.decompress(content), np.uint8).reshape(3, -1, 32, 32)
    except (lzma.LZMAError, EOFError, ValueError) as error:
        raise DataError(f"{part}: not readable ({error}); expected an xz stream of 3 x N x 32 x 32 bytes.") from error
    planes = residual.cumsum(axis=2, dtype=np.uint8).cumsum(axis=3, dtype=np.uint8)
    green = planes[0]
    return np.stack([planes[1] + green, green, planes[2] + green], axis=1)
