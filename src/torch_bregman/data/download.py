"""Where the files of a known data set lie: in the user's folder, or in a cache that is filled from the net.

The environment variable TORCH_BREGMAN_DATA_URL names a mirror: the file F of the data set D is then taken from
TORCH_BREGMAN_DATA_URL/D/F instead of its home. Checksums are checked all the same.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from torch_bregman.data.errors import DataError, missing_extra

if TYPE_CHECKING:
    from rich.progress import TaskID


def default_cache() -> Path:
    """The user's cache folder of this library, as pooch names it on this system."""
    try:
        import pooch
    except ImportError as error:
        raise missing_extra("The default cache folder", "pooch") from error
    return Path(pooch.os_cache("torch-bregman"))


def absent(name: str, root: Path, files: list[str]) -> DataError:
    """The error for a `root` that lacks `files`."""
    return DataError(
        f"{name}: {root / name} lacks {', '.join(files)}; expected it there because of `root` (--data-root)."
    )


def fetch(name: str, home: str, hashes: dict[str, str], cache: Path | None) -> list[Path]:
    """The files of the data set `name`, downloaded from `home` to `cache`/`name` where they are not there yet.

    `hashes`: file name -> md5. A file appears under its name only after its md5 was found right.
    """
    try:
        import pooch
    except ImportError as error:
        raise missing_extra(f"Downloading {name}", "pooch") from error
    mirror = os.environ.get("TORCH_BREGMAN_DATA_URL")
    home = f"{mirror.rstrip('/')}/{name}/" if mirror else home
    folder = (cache or default_cache()) / name
    pooch.get_logger().setLevel("WARNING")  # the bar says what its log would
    paths = []
    for file, md5 in hashes.items():
        try:
            with Bar(file) as bar:
                downloader = pooch.HTTPDownloader(progressbar=bar, chunk_size=2**16)
                paths.append(
                    Path(pooch.retrieve(home + file, f"md5:{md5}", fname=file, path=folder, downloader=downloader))
                )
        except OSError as error:  # requests' exceptions are OSErrors, too
            # Only an answer of the server or an error of the file system reads well; the others show urllib3's insides.
            plain = getattr(error, "response", None) is not None or error.errno is not None
            reason = str(error) if plain else f"{type(error).__name__}, {home}{file}"
            raise DataError(
                f"{name}: could not download {file} ({reason}); without a connection pass --data-root DIR, "
                f"where DIR/{name}/ holds {', '.join(hashes)}."
            ) from error
        except ValueError as error:  # pooch's word for a wrong checksum
            raise DataError(
                f"{name}: {file} from {home} has the wrong checksum and was not kept; expected md5 {md5}."
            ) from error
    return paths


class Bar:
    """A progress bar on the terminal, with the four members that pooch asks for; silent elsewhere."""

    def __init__(self, file: str) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError as error:
            raise missing_extra("Downloading", "rich") from error
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._file = file
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def total(self) -> int:
        return 0 if self._task is None else int(self._progress.tasks[self._task].total or 0)

    @total.setter
    def total(self, value: int) -> None:  # the download begins: a file that is there already shows no bar
        self._progress.start()
        self._task = self._progress.add_task(self._file, total=value or None)

    def update(self, size: int) -> None:
        if self._task is not None:
            self._progress.advance(self._task, size)

    def reset(self) -> None:
        if self._task is not None:
            self._progress.reset(self._task, total=self.total or None)

    def close(self) -> None:
        self._progress.stop()
