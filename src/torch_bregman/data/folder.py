"""The user's own images: FOLDER/train/CLASS/*.png, and val/ and test/ if wanted; or FOLDER/CLASS/*.png."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from torch_bregman.data.errors import DataError, missing_extra
from torch_bregman.data.splits import Pair, Raw

SUFFIXES = {".png", ".jpg", ".jpeg"}
KINDS = ("train", "val", "test")


def read(folder: Path) -> Raw:
    """The images in `folder`, in the order of their names, as uint8: [N, 1, H, W] if all are grey, else RGB."""
    kinds = {kind: folder / kind for kind in KINDS if (folder / kind).is_dir()}
    if kinds and "train" not in kinds:
        raise DataError(f"{folder}: has {' and '.join(kinds)}/ but no train/; expected train/CLASS/*.png.")
    if other := [sub.name for sub in subfolders(folder) if kinds and sub.name not in kinds]:
        raise DataError(f"{folder}: has {other[0]}/ beside train/; expected no other folders than {', '.join(KINDS)}.")
    kinds = kinds or {"train": folder}
    classes = tuple(sub.name for sub in subfolders(kinds["train"]))
    if len(classes) < 2:
        raise DataError(
            f"{kinds['train']}: has {len(classes)} class folders; expected at least two, each with .png or .jpg files."
        )
    files = {kind: class_files(top, classes) for kind, top in kinds.items()}
    channels, size = measure([file for pairs in files.values() for file, _ in pairs])
    loaded = {kind: load_images(pairs, channels, size) for kind, pairs in files.items()}
    return Raw(folder.resolve().name, loaded["train"], classes, validation=loaded.get("val"), test=loaded.get("test"))


def subfolders(folder: Path) -> list[Path]:
    return sorted(
        (sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith(".")), key=lambda sub: sub.name
    )


def class_files(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """The image files in `folder`, each with the position of its class."""
    found = []
    for sub in subfolders(folder):
        if sub.name not in classes:
            raise DataError(
                f"{sub}: the class {sub.name!r} has no folder in train/; expected one of {', '.join(classes)}."
            )
        images = sorted(
            file for file in sub.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
        )
        if not images:
            raise DataError(f"{sub}: holds no images; expected .png or .jpg files.")
        found += [(file, classes.index(sub.name)) for file in images]
    if not found:
        raise DataError(f"{folder}: holds no images; expected {classes[0]}/*.png and so on.")
    return found


def measure(files: list[Path]) -> tuple[int, tuple[int, int]]:
    """Channels (1 if all are grey, else 3) and the common size (width, height), from the headers of all `files`."""
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("Reading an image folder", "pillow") from error
    headers = []
    for file in files:
        try:
            with Image.open(file) as image:
                headers.append((image.size, image.mode))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise unreadable(file, error) from error
    common = headers[0][0]
    for file, (size, mode) in zip(files, headers, strict=True):
        if mode.startswith(("I", "F")):
            raise DataError(f"{file}: has more than 8 bits per pixel (mode {mode}); expected 8-bit grey or RGB.")
        if size != common:
            raise DataError(
                f"{file}: is {size[0]} x {size[1]} pixels; expected {common[0]} x {common[1]}, the size of {files[0]}."
            )
    return 1 if all(mode in ("1", "L", "LA") for _, mode in headers) else 3, common


def load_images(pairs: list[tuple[Path, int]], channels: int, size: tuple[int, int]) -> Pair:
    """Pixels uint8 [N, channels, H, W] and labels [N]."""
    from PIL import Image

    x = np.empty((len(pairs), channels, size[1], size[0]), np.uint8)
    for i, (file, _) in enumerate(pairs):
        try:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise unreadable(file, error) from error
        x[i] = pixels if channels == 1 else pixels.transpose(2, 0, 1)
    return x, np.array([label for _, label in pairs])


def unreadable(file: Path, error: Exception) -> DataError:
    return DataError(f"{file}: not readable ({error}); expected a complete PNG or JPEG image.")
