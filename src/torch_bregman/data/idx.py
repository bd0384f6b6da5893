"""MNIST and Fashion-MNIST in their original format, IDX: a big-endian header, then the bytes.

0 0 8 d   n_1 ... n_d (four bytes each)   n_1 * ... * n_d bytes        (8: the numbers are uint8; d: dimensions)
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from torch_bregman.data.download import absent, fetch
from torch_bregman.data.errors import DataError
from torch_bregman.data.normalise import Array
from torch_bregman.data.splits import Pair, Raw

HOMES = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion-mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",  # plain http: the md5 is the guard
}
HASHES = {
    "mnist": {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
}
CLASSES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}


def read(name: str, root: Path | None, cache: Path | None) -> Raw:
    """The data set `name` from `root`/`name`, or downloaded to the cache where `root` is None."""
    if root is None:
        paths = fetch(name, HOMES[name], HASHES[name], cache)
    else:
        choices = [(root / name / file, root / name / file.removesuffix(".gz")) for file in HASHES[name]]
        if missing := [zipped.name for zipped, plain in choices if not (zipped.is_file() or plain.is_file())]:
            raise absent(name, root, missing)
        paths = [zipped if zipped.is_file() else plain for zipped, plain in choices]
    train, test = read_pair(paths[0], paths[1]), read_pair(paths[2], paths[3])
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DataError(
            f"{paths[2]}: got images {test[0].shape[2:]}; expected {train[0].shape[2:]}, as in {paths[0].name}."
        )
    return Raw(name, train, CLASSES[name], test=test, held_out=5000)


def read_pair(images: Path, labels: Path) -> Pair:
    """Images [N, 1, H, W] and labels [N], both uint8, of two IDX files."""
    x, y = read_idx(images, 3), read_idx(labels, 1)
    if len(x) != len(y):
        raise DataError(f"{labels}: got {len(y)} labels; expected {len(x)}, one for each image in {images.name}.")
    if y.max(initial=0) > 9:
        raise DataError(f"{labels}: got the label {y.max()}; expected 0 to 9.")
    return x[:, None], y


def read_idx(path: Path, dimensions: int) -> Array:
    """The uint8 array with `dimensions` axes in the IDX file `path`, which is gzipped if its name ends in .gz."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: not readable ({error}); expected a complete {'gzipped ' * (path.suffix == '.gz')}IDX file."
        ) from error
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic:
        raise DataError(
            f"{path}: starts with {content[:4].hex(' ') or 'nothing'}; "
            f"expected {magic.hex(' ')}, an IDX file of uint8 with {dimensions} axes."
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise DataError(f"{path}: ends within its header of {start} bytes, after {len(content)}.")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if math.prod(shape) == 0 or len(content) - start != math.prod(shape):
        raise DataError(
            f"{path}: holds {len(content) - start} bytes after its header, which says {list(shape)}; "
            f"expected {math.prod(shape)}, and more than none."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
