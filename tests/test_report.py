"""The page that a run leaves behind: complete, self-contained, and never the reason why a run fails."""

import base64
import io
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from torch_bregman.report import terminal_summary, weight_pattern, write_report
from torch_bregman.report.patterns import png_data_uri
from torch_bregman.report.records import read_run
from torch_bregman.report.words import duration, near, number, percent, points

LAYERS = {"0.weight": (16, 24), "2.weight": (4, 16)}
SIZES = {name: out * rest for name, (out, rest) in LAYERS.items()}
WEIGHTS = sum(SIZES.values())


def row(epoch: int, **changes: object) -> dict[str, object]:
    kept = {name: round(size * (0.01 + 0.04 * epoch / 4)) for name, size in SIZES.items()}
    made: dict[str, object] = {
        "epoch": epoch, "train_loss": None if epoch == 0 else 2 / epoch, "val_loss": 2.2 / (epoch + 1),
        "val_accuracy": 0.9 + 0.01 * epoch, "density": 0.01 + 0.01 * epoch, "lam": 1.3, "lr": 0.01, "seconds": 1.5,
        "images_per_second": 4e4, "on_target": epoch == 4, "layers": {n: kept[n] / SIZES[n] for n in SIZES},
        "kept_layers": kept, "size_layers": SIZES,
    }  # fmt: skip
    made.update(changes)
    return made


END = {"event": "end", "asked_density": 0.05, "density": 0.05, "kept": 8680, "weights": 173600, "test_accuracy": 0.981,
       "val_accuracy": 0.98, "best_epoch": 4, "seconds": 43.2, "note": ""}  # fmt: skip


def write_lines(folder: Path, *rows: object, tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail, encoding="utf-8")
    return folder


CHOICES = [
    {"layer": "0", "computes": "sparse", "density": 0.02, "dense_ms": 1.8, "sparse_ms": 0.6},
    {"layer": "2", "computes": "dense", "density": 0.3, "dense_ms": 0.5, "sparse_ms": 0.625},
    {"layer": "(network)", "computes": "compact", "density": 0.1, "dense_ms": 2.5, "sparse_ms": 1.25},
]


def levels(epoch: int) -> dict[str, object]:
    """What a multilevel run has done by the end of `epoch`: its epochs take 60, 50, 40, ... % of the dense FLOPs."""
    flops = sum(1e12 * (0.7 - 0.1 * e) for e in range(1, epoch + 1))
    return {"flops": flops, "dense_flops": 1e12 * epoch, "fine_steps": 300 * epoch, "coarse_steps": 1200 * epoch}


def with_levels(folder: Path, epochs: int = 5) -> Path:
    """`folder` with metrics of a multilevel run."""
    rows = [row(0, seconds=0.0), *(row(e, seconds=2 - 0.2 * e, **levels(e)) for e in range(1, epochs))]
    return write_lines(folder, *rows, {**END, **levels(epochs - 1), "choices": CHOICES})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A complete run of four epochs with its twin and its patterns."""
    folder = write_lines(tmp_path / "run", *map(row, range(5)), END)
    twin = [row(e, density=1.0, lam=0.0, on_target=False, val_accuracy=0.95) for e in range(5)]
    write_lines(folder / "dense", *twin, {**END, "test_accuracy": 0.984, "asked_density": 1.0, "density": 1.0})
    recipe = 'dataset = "mnist"\nmodel = "lenet"\noptimizer = "adabreg"\ndensity = 0.05\nlam = 1.3\nseed = 7\n'
    (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
    pictures = {f"{when}/{name}": weight_pattern(torch.eye(*shape)) for when in ("start", "middle", "end")
                for name, shape in LAYERS.items()}  # fmt: skip
    np.savez(folder / "patterns.npz", **pictures)
    return folder


class Page(HTMLParser):
    """Collects the tags with their attributes, the visible text, and how many elements are open."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.styles = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles += data
        else:
            self.text += data

    def figures(self) -> list[str]:
        return [a["class"].split("figure-")[1] for tag, a in self.tags if tag == "figure" and a.get("class")]


def test_complete_page(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path)
    for text in ("lenet on mnist, trained sparse with adabreg", "asked 5.00 % / got 5.00 %", "8,680 of 173,600 weights",
                 "98.10 %", "dense twin 98.40 %, −0.30 points", "43.2 s", "λ at the end", "16 × 24",
                 "biases and norms are not counted", "torch-bregman train --config recipe.toml"):  # fmt: skip
        assert text in page.text, text
    assert page.figures() == ["accuracy", "loss", "density", "layers", "lam", "seconds"]
    assert "coarse" not in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 6
    assert [p.name for p in run.iterdir() if p.suffix == ".tmp"] == []


def test_multilevel_page(run: Path) -> None:
    page = Page(write_report(with_levels(run)))
    assert page.figures() == ["accuracy", "loss", "density", "layers", "lam", "seconds", "work"]
    for text in ("45.00 % of dense FLOPs", "1,200 fine and 4,800 coarse steps", "How each layer computes", "3.0 ×",
                 "0.8 ×", "(network)", "compact", "1.800", "sparse 1.2 s", "dense 1.5 s", "sparse 30.00 %",
                 "dense 100 %", "2 × weights × positions × batch"):  # fmt: skip
        assert text in page.text, text
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_work_of_an_epoch_is_what_it_added(run: Path) -> None:
    x, y = read_run(with_levels(run)).work
    assert x == [1, 2, 3, 4]
    assert y == pytest.approx([0.6, 0.5, 0.4, 0.3])
    rows = [row(0), row(1, **levels(1)), row(2), row(3, **levels(3)), row(4, **levels(3)), row(5, **levels(1))]
    x, y = read_run(write_lines(run, *rows)).work
    assert x == [1, 3]  # nothing is known of the second epoch, and nothing was added in the last two
    assert y == pytest.approx([0.6, 0.45])


def test_first_epochs_of_a_multilevel_run(run: Path) -> None:
    page = Page(write_report(write_lines(run, row(0, seconds=0.0), row(1, **levels(1)))))
    assert "60.00 % of dense FLOPs" in page.text
    assert not {"seconds", "work"} & set(page.figures())
    assert "How each layer computes" not in page.text


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), "text", None, -1.0, 0, True, {}, 10**400],
    ids=lambda value: "10**400" if value == 10**400 else repr(value),
)
def test_odd_values_of_a_multilevel_run(run: Path, value: object) -> None:
    keys = ("flops", "dense_flops", "fine_steps", "coarse_steps")
    good = [row(e, **levels(e)) for e in range(1, 4)]
    mixed = [row(e, **{**levels(e), key: value}) for e, key in enumerate((*keys, "seconds"), 4)]
    choices = [value, *({**choice, name: value} for choice in CHOICES for name in choice)]
    page = Page(write_report(write_lines(run, *good, *mixed, row(9, **levels(9)), {**END, "choices": choices})))
    assert {"seconds", "work"} <= set(page.figures())
    bad = [row(e, **dict.fromkeys(keys, value)) for e in range(3)]
    end = {**END, **dict.fromkeys(keys, value), "choices": value}
    page = Page(write_report(write_lines(run, *bad, end)))
    assert "work" not in page.figures()
    assert "How each layer computes" not in page.text


def test_page_is_self_contained(run: Path) -> None:
    page = Page(write_report(run))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "image", "a"}
    for tag, attributes in page.tags:
        for key, value in attributes.items():
            if key in ("src", "href", "xlink:href", "srcset", "data", "poster"):
                assert value is not None
                assert value.startswith(("#", "data:image/png;base64,")), (tag, key, value)
            if key == "style":
                assert "url(" not in (value or "").replace("url(#", "")
    assert "@import" not in page.styles
    assert "url(" not in page.styles


def test_page_is_deterministic_and_its_ids_unique(run: Path) -> None:
    first = write_report(run).read_text(encoding="utf-8")
    assert write_report(run).read_text(encoding="utf-8") == first
    ids = [a["id"] for _, a in Page(run / "report.html").tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>$\\frac{$'\"&\x1b[31m\n"
    choices = [{**CHOICES[0], "layer": evil, "computes": evil}]
    rows = [row(e, layers={evil: 0.1 * e, "日本 weight": 0.2}, kept_layers={evil: 3}, size_layers=[]) for e in range(3)]
    folder = write_lines(tmp_path, *rows, {"event": evil, "epoch": 1}, {**END, "note": evil, "choices": choices})
    recipe = "\n".join(f"{key} = {json.dumps(evil)}" for key in ("dataset", "model", "optimizer", json.dumps(evil)))
    (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
    np.savez(folder / "patterns.npz", **{f"end/{evil}": np.full((2, 3), 255, np.uint8), "else": np.zeros(3)})
    path = write_report(folder)
    page = Page(path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script>alert(1)</script>" in page.text
    assert "\x1b" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("tail", ['{"epoch": 5, "train_lo', '{"epoch": 5}}', "[1]\n", "\x00\x00\n", '{"epoch": "x"}\n'])
def test_truncated_metrics(tmp_path: Path, tail: str) -> None:
    page = Page(write_report(write_lines(tmp_path, *map(row, range(4)), tail=tail)))
    assert "This run has not ended" in page.text
    assert "1 line of metrics.jsonl cut off or unreadable" in page.text
    assert "got 4.00 %" in page.text
    assert "density" in page.figures()


def test_resumed_run_repeats_epochs(tmp_path: Path) -> None:
    folder = write_lines(
        tmp_path, row(0), row(1), row(2), END, {"event": "resume"}, row(1, density=0.5), row(2), row(3)
    )
    record = read_run(folder)
    assert [r["epoch"] for r in record.epochs] == [0, 1, 2, 3]
    assert record.epochs[1]["density"] == 0.5
    assert record.end is None  # what followed the end is newer than it
    assert record.marks == [(2.0, "resume")]


@pytest.mark.parametrize("part", ["recipe.toml", "metrics.jsonl", "patterns.npz", "dense/metrics.jsonl"])
@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_missing_or_damaged_parts(run: Path, part: str, damage: str) -> None:
    if damage == "missing":
        (run / part).unlink()
    else:
        (run / part).write_bytes(b"PK\x03\x04\xff = garbage")
    page = Page(write_report(run))
    assert "How to repeat" in page.text
    assert ("dense twin 98.40 %" in page.text) == (not part.endswith("metrics.jsonl"))


def test_empty_folder_and_no_folder(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    assert "Nothing has been recorded yet" in page.text
    assert page.figures() == []
    with pytest.raises(FileNotFoundError, match="`run` must be the folder of a run"):
        write_report(tmp_path / "nowhere")


def test_autoencoder_has_losses_only(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row(e).items() if k != "val_accuracy"} for e in range(4)]
    folder = write_lines(tmp_path, *rows, {"event": "end", "asked_density": None, "density": 0.04, "test_loss": 0.0123})
    page = Page(write_report(folder))
    assert page.figures() == ["loss", "density", "layers", "lam", "seconds"]
    assert "Test loss" in page.text
    assert "λ was held fixed" in page.text
    assert "asked" not in page.text


@pytest.mark.parametrize("value", [float("nan"), "text", None, -1.0, {}, 10**400])
def test_odd_values_leave_gaps(tmp_path: Path, value: object) -> None:
    keys = ("train_loss", "val_loss", "val_accuracy", "density", "lam", "seconds", "layers", "on_target", "kept_layers")
    rows = [row(0), row(1), row(2, **dict.fromkeys(keys, value))]
    Page(write_report(write_lines(tmp_path, *rows, {**dict.fromkeys(END, value), "event": "end"})))
    Page(write_report(write_lines(tmp_path, row(0, **dict.fromkeys(keys, value)))))


def test_many_layers_stay_a_page(tmp_path: Path) -> None:
    layers = {f"blocks.{i}.weight": 0.01 * (i + 1) for i in range(90)}
    sizes = {name: i + 1 for i, name in enumerate(layers)}
    page = Page(write_report(write_lines(tmp_path, *(row(e, layers=layers, size_layers=sizes) for e in range(3)))))
    assert "Density of each layer, the 40 largest" in page.text
    assert "blocks.0.weight" in page.text  # the table has them all


def test_leaves_matplotlib_as_it_was(run: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "black"}):
        write_report(run)
        assert matplotlib.rcParams["text.usetex"]
    assert dict(matplotlib.rcParams) == before


def test_failed_write_leaves_the_old_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_report(run).read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("torch_bregman.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(run)
    assert (run / "report.html").read_bytes() == old
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize("shape", [(3, 5), (128, 128), (300, 7), (1000, 700), (130, 3, 5, 5), (1, 4000), (2, 2, 2)])
def test_a_single_live_weight_is_seen(shape: tuple[int, ...]) -> None:
    for place in (0, -1):
        weight = torch.zeros(shape)
        weight.view(-1)[place] = -1e-30
        picture = weight_pattern(weight)
        out, rest = shape[0], weight.numel() // shape[0]
        assert picture.shape == (min(out, 128), min(rest, 128))
        assert picture.dtype == np.uint8
        assert (picture > 0).sum() == 1
        assert picture.ravel()[place] >= 110


def test_pattern_counts_every_weight_once() -> None:
    weight = torch.zeros(301, 203)
    weight[7, 9] = weight[300, 202] = 1
    share = ((np.maximum(weight_pattern(weight, 10).astype(float), 110) - 110) / 145) ** 2
    area = np.outer(np.diff(np.arange(11) * 301 // 10), np.diff(np.arange(11) * 203 // 10))
    assert np.round(share * area).sum() == pytest.approx(2, abs=1)
    assert (weight_pattern(torch.ones(301, 203), 10) == 255).all()
    assert (weight_pattern(torch.zeros(301, 203), 10) == 0).all()
    exact = weight_pattern(torch.eye(5, 4, dtype=torch.bfloat16, requires_grad=True))
    assert (exact == 255 * np.eye(5, 4)).all()


def test_pattern_rejects_vectors() -> None:
    with pytest.raises(ValueError, match="`weight` must have at least two dimensions"):
        weight_pattern(torch.ones(3))
    with pytest.raises(ValueError, match="`size` must be positive"):
        weight_pattern(torch.ones(3, 3), 0)
    assert weight_pattern(torch.ones(3, 0)).shape == (3, 0)


def test_png_holds_the_picture() -> None:
    from PIL import Image

    picture = np.arange(256, dtype=np.uint8).reshape(8, 32)
    data = base64.b64decode(png_data_uri(picture).split(",")[1])
    with Image.open(io.BytesIO(data)) as image:
        assert (np.asarray(image.convert("RGBA"))[..., 3] == picture).all()


def test_terminal_summary(run: Path) -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    (run / "recipe.toml").write_text('model = "[red]x[/red]"\ndataset = "mnist"\n', encoding="utf-8")
    write_report(run)
    console.print(terminal_summary(run))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("asked 5.00 % / got 5.00 %", "98.10 %", "dense twin 98.40 %", "report.html", "[red]x[/red] on mnist"):
        assert part in text


def test_terminal_summary_of_a_multilevel_run(run: Path) -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100)
    console.print(terminal_summary(with_levels(run)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "45.00 % of dense FLOPs   1,200 fine and 4,800 coarse steps" in text


def test_what_is_not_counted_is_said(run: Path) -> None:
    said = "90 of 120 matrix entries are counted, without <x> (not known; 30)"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    end = next(row for row in rows if row.get("event") == "end")
    end["uncounted"] = said
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(run).read_text(encoding="utf-8")
    assert "90 of 120 matrix entries are counted, without &lt;x&gt; (not known; 30)." in page
    from rich.console import Console

    console = Console(width=120, file=io.StringIO())
    console.print(terminal_summary(run))
    assert "90 of 120 matrix entries" in console.file.getvalue()


def test_words() -> None:
    assert [percent(v) for v in (0.05, 1.0, 0.00123, 0.0000456, 0.0)] == [
        "5.00 %", "100.00 %", "0.123 %", "0.00456 %", "0.00 %"]  # fmt: skip
    assert [points(v) for v in (-0.003, 0.001, -1e-9)] == ["−0.30 points", "+0.10 points", "±0.00 points"]
    assert [duration(v) for v in (43.21, 59.97, 725, 3599.7, 7980)] == [
        "43.2 s", "1 min 00 s", "12 min 05 s", "1 h 00 min", "2 h 13 min"]  # fmt: skip
    assert near(0.0505, 0.05)
    assert not near(0.0506, 0.05)
    assert not near(0.05, None)
    assert number(float("inf")) is None


def test_missing_extra_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'pip install "torch-bregman\[train\]"'):
        write_report(run)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


@pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is on PATH")
def test_opens_in_a_browser(run: Path, tmp_path: Path) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
             "--disable-component-update", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}",
             "--virtual-time-budget=2000", "--dump-dom"]  # fmt: skip
    assert BROWSER is not None
    done = subprocess.run([BROWSER, *flags, write_report(run).as_uri()], capture_output=True, timeout=30, check=True)
    dom = done.stdout.decode("utf-8")
    for text in ("asked 5.00 % / got 5.00 %", "8,680 of 173,600 weights", "dense twin 98.40 %, −0.30 points"):
        assert text in dom
    assert dom.count("<svg") == 6


# ---------------------------------------------------------------------- a network in a loop of one's own


def test_a_network_is_drawn_without_a_run(tmp_path: Path) -> None:
    import torch_bregman as tb
    from torch_bregman.report import picture

    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"<b>": torch.nn.Linear(40, 30), "head": torch.nn.Conv2d(4, 5, 3)})
    tb.sparse_init_(model, 0.2)
    drawn = picture(model)
    page = drawn._repr_html_()
    assert "<b>" not in page
    assert page.count("<img") == 2
    assert page.count("<svg") == 1
    assert page.count("20.00 %") >= 3  # both layers, and all
    uri = page.split('src="data:image/png;base64,')[1].split('"')[0]
    assert base64.b64decode(uri).startswith(b"\x89PNG")
    assert "var(--sparse)" in page
    assert "--sparse:#0072b2" in page  # no page of ours defines the colours in a notebook
    assert drawn.write(tmp_path / "net.html").read_text(encoding="utf-8").count("<svg") == 1


def test_a_network_with_nothing_alive_and_one_of_many_layers_are_drawn() -> None:
    from torch_bregman.report import picture

    empty = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(empty.weight)
    assert "0.00 %" in picture(empty)._repr_html_()
    many = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(60)))
    page = picture(many)._repr_html_()
    assert page.count("<img") == 40
    assert page.count("<svg") == 2
