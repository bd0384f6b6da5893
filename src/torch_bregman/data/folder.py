"""The user's own images: FOLDER/train/CLASS/*.png, and val/ and test/ if wanted; or FOLDER/CLASS/*.png."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np

from torch_bregman.data.errors import DataError, missing_extra
from torch_bregman.data.splits import Pair, Raw
from torch_bregman.data.words import split_of

SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm",
    ".pnm", ".tga", ".jp2", ".j2k", ".avif", ".apng", ".qoi",
}  # fmt: skip
ORIENTATION = 0x0112  # of EXIF; 1 is upright


def read(folder: Path) -> Raw:
    """The images in `folder`, in the order of their names, as uint8: [N, 1, H, W] if all are grey, else RGB.

    Images in folders inside that of a class belong to it. What else lies there is told in the note.
    """
    kinds = split_folders(folder)
    classes = tuple(sub.name for sub in subfolders(kinds["train"]))
    if len(classes) < 2:
        raise DataError(f"{kinds['train']}: has {len(classes)} class folders; expected at least two, each with images.")
    notes: list[str] = []
    files = {kind: class_files(top, classes, notes) for kind, top in kinds.items()}
    if kinds["train"] != folder:
        notes += left_out(folder, folder, files_in(folder))
    channels, size = measure([file for pairs in files.values() for file, _ in pairs], notes)
    loaded = {kind: load_images(pairs, channels, size) for kind, pairs in files.items()}
    return Raw(
        folder.resolve().name, loaded["train"], classes, validation=loaded.get("val"), test=loaded.get("test"),
        note="; ".join(notes),
    )  # fmt: skip


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of train, val and test; where there are none, `folder` holds the classes to train on.

    Words such as valid/ mean a split only beside train/, for they may be classes.
    """
    found = subfolders(folder)
    words = [(split_of(sub.name), sub) for sub in found]
    if all(kind != "train" for kind, _ in words):
        if given := [sub.name for sub in found if sub.name in ("val", "test")]:
            raise DataError(f"{folder}: has {' and '.join(given)}/ but no train/; expected train/CLASS/*.png.")
        return {"train": folder}
    kinds: dict[str, Path] = {}
    for kind, sub in words:
        if kind is None:
            raise DataError(
                f"{folder}: has {sub.name}/ beside train/; expected no other folders than train, val, test."
            )
        if kind in kinds:
            raise DataError(f"{folder}: has {kinds[kind].name}/ and {sub.name}/; expected one of them, as {kind}/.")
        kinds[kind] = sub
    return kinds


def subfolders(folder: Path) -> list[Path]:
    return sorted(
        (sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith(".")), key=lambda sub: sub.name
    )


def files_in(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]


def class_files(folder: Path, classes: tuple[str, ...], notes: list[str]) -> list[tuple[Path, int]]:
    """The image files in `folder`, each with the position of its class."""
    found = []
    notes += left_out(folder, folder, files_in(folder))
    for sub in subfolders(folder):
        if sub.name not in classes:
            raise DataError(
                f"{sub}: the class {sub.name!r} has no folder in train/; expected one of {', '.join(classes)}."
            )
        files = all_files(sub)
        images = [file for file in files if file.suffix.lower() in SUFFIXES]
        others = left_out(folder, sub, [file for file in files if file.suffix.lower() not in SUFFIXES])
        if not images:
            raise DataError(
                f"{sub}: holds no images; expected .png, .jpg or others{''.join(f' ({o})' for o in others)}."
            )
        notes += others
        if deeper := Counter(file.parent.relative_to(folder).as_posix() for file in images if file.parent != sub):
            places = ", ".join(f"{place}/ ({count})" for place, count in sorted(deeper.items())[:3])
            more = f" and {len(deeper) - 3} more folders" if len(deeper) > 3 else ""
            notes.append(f"images of {places}{more} count for the class {sub.name}")
        found += [(file, classes.index(sub.name)) for file in images]
    if not found:
        raise DataError(f"{folder}: holds no images; expected {classes[0]}/*.png and so on.")
    return found


def all_files(folder: Path) -> list[Path]:
    """The files in `folder` and in folders inside it, also linked ones, by name."""
    found, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        if inner := [name for name in folders if split_of(name)]:
            raise DataError(
                f"{Path(place) / inner[0]}: a folder of this name lies inside the class {folder.name}; expected "
                f"{inner[0]}/{folder.name}/, the splits outside the classes."
            )
        found += [Path(place) / name for name in files if not name.startswith(".")]
    return sorted(found)


def left_out(top: Path, folder: Path, files: list[Path]) -> list[str]:
    """That so many files of a kind are not read, where there are some."""
    if not files:
        return []
    kinds = Counter(file.suffix.lower() or "without a suffix" for file in files)
    place = top.name if folder == top else folder.relative_to(top).as_posix()
    return [f"left out of {place}/: {', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}"]


def measure(files: list[Path], notes: list[str]) -> tuple[int, tuple[int, int]]:
    """Channels (1 if all are grey, else 3) and the common size (width, height), from the headers of all `files`."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise missing_extra("Reading an image folder", "pillow") from error
    headers, moving = [], []
    for file in files:
        try:
            with Image.open(file) as image:
                exif = image.format != "PNG" or "exif" in image.info  # to look further, Pillow decodes all of a PNG
                if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # whose second picture is a preview
                    moving.append(file)
                turned = exif and image.getexif().get(ORIENTATION, 1) != 1
                # Some readers exchange the sides in the header already, and some not.
                headers.append((ImageOps.exif_transpose(image).size if turned else image.size, image.mode))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise unreadable(file, error) from error
    if moving:
        notes.append(
            f"of {moving[0]}{f' and {len(moving) - 1} more' if moving[1:] else ''} the first frame alone is read"
        )
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
    """Pixels uint8 [N, channels, H, W], upright as EXIF says, and labels [N]."""
    from PIL import Image, ImageOps

    x = np.empty((len(pairs), channels, size[1], size[0]), np.uint8)
    for i, (file, _) in enumerate(pairs):
        try:
            with Image.open(file) as image:
                pixels = np.asarray(ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise unreadable(file, error) from error
        if pixels.shape[:2] != x.shape[2:]:
            raise DataError(
                f"{file}: is turned by EXIF data at its end; expected a picture of {size[0]} x {size[1]} pixels."
            )
        x[i] = pixels if channels == 1 else pixels.transpose(2, 0, 1)
    return x, np.array([label for _, label in pairs])


def unreadable(file: Path, error: Exception) -> DataError:
    return DataError(f"{file}: not readable ({error}); expected a complete image.")
