"""The proof sheet: figures that can be checked by hand, losses that are said, and the commands of a finished run."""

import copy
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import torch_bregman as tb
from torch_bregman.export.load import load_sparse
from torch_bregman.models import build
from torch_bregman.proof import Fact, Latency, Proof, Units, prove, sizes
from torch_bregman.proof.measure import random_weights

pytest.importorskip("rich")
pytest.importorskip("jinja2")

from torch_bregman.cli import main
from torch_bregman.report import write_report


def network(*, sparse: bool) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    if sparse:
        tb.sparse_init_(model[0], 0.1, "rows", torch.Generator().manual_seed(0))
    return model


PROOF = Proof(
    measure="test accuracy",
    accuracy={"dense": 0.984, "sparse": 0.981, "shrunk": 0.981, "optimized": 0.9811},
    density=0.05,
    difference=3e-7,
    facts=(
        Fact("parameters", 266_610, 13_274, "", "counted"),
        Fact("FLOPs per sample", 532_400, 26_548, "FLOP", "by formula"),
        Fact("file", 1_068_000, 31_400, "B", "safetensors"),
        Fact("memory at batch 64", 1_100_000, 1_200_000, "B", "added up"),
    ),
    latencies=(
        Latency("dense, PyTorch", 1, 2, 5e-5, 6e-5, 1.02),
        Latency("dense, ONNX Runtime", 1, 1, 2e-5, 3e-5, 0.4),
        Latency("dense, torch.compile", 1, missing="No C++ compiler was found."),
        Latency("sparse, optimized", 1, 1, 5e-5, 6e-5, 1.0),
        Latency("sparse, ONNX Runtime", 1, 1, 1e-5, 2e-5, 0.2),
        Latency("dense, PyTorch", 64, 2, 1e-3, 0.2, 4.0),
        Latency("sparse, optimized", 64, 1, 2.5e-4, 3e-4, 1.0),
    ),
    units=(Units("0", "Linear", (300, 784), (87, 784)), Units("2", "Linear", (10, 300), (10, 87), "outputs")),
    machine="a small machine",
    notes=("measured on a Tuesday",),
)


# ---------------------------------------------------------------------- what the sheet says


def cells(proof: Proof) -> list[tuple[tuple[str, ...], bool | None]]:
    return [(line.cells, line.good) for _, lines in (proof.comparison, proof.speed) for line in lines]


def test_it_says_where_the_sparse_network_wins_and_loses():
    assert cells(PROOF) == [
        (("test accuracy", "98.40 %", "98.10 %", "0.30 points lower"), False),
        (("after shrinking", "", "98.10 %", "the same as trained"), None),
        (("after optimizing", "", "98.11 %", "0.01 points higher than trained"), None),
        (("outputs after that", "", "off by 3e-07", "the same within rounding"), None),
        (("parameters", "266,610", "13,274", "20.1 × less"), True),
        (("FLOPs per sample", "532 kFLOP", "26.5 kFLOP", "20.1 × less"), True),
        (("file", "1.07 MB", "31.4 kB", "34.0 × less"), True),
        (("memory at batch 64", "1.1 MB", "1.2 MB", "1.09 × more"), False),
        (("1", "dense, PyTorch", "2", "0.050", "0.060", "about equal"), None),
        (("1", "dense, ONNX Runtime", "1", "0.020", "0.030", "2.50 × slower"), False),
        (("1", "dense, torch.compile", "", "—", "—", "not measured: No C++ compiler was found."), None),
        (("1", "sparse, optimized", "1", "0.050", "0.060", ""), None),
        (("1", "sparse, ONNX Runtime", "1", "0.010", "0.020", "5.00 × slower"), None),
        (("64", "dense, PyTorch", "2", "1.000", "200.0", "4.00 × faster"), True),
        (("64", "sparse, optimized", "1", "0.250", "0.300", ""), None),
    ]
    assert PROOF.verdict == (
        "The sparse network loses in test accuracy; memory at batch 64; latency against dense, ONNX Runtime at batch 1."
        " At batch 1 it is faster as an ONNX file: torch-bregman export RUN."
    )
    for line in (
        *PROOF.verdict.split("; "),
        "measured on a small machine",
        "measured on a Tuesday",
        "file: safetensors",
    ):
        assert line in str(PROOF)


def test_other_verdicts():
    wins = replace(PROOF, accuracy={"dense": 0.98, "sparse": 0.98}, facts=PROOF.facts[:1], latencies=())
    assert wins.verdict == "The sparse network loses nowhere here."
    assert cells(wins)[0] == (("test accuracy", "98.00 %", "98.00 %", "the same"), None)
    wrong = replace(wins, difference=0.02)
    assert wrong.verdict == "The sparse network loses in outputs after that."
    assert "NOT the outputs of the trained network" in str(wrong)
    loss = replace(wins, measure="test loss", accuracy={"dense": 0.5, "sparse": 0.55, "shrunk": 0.55})
    assert cells(loss)[:2] == [
        (("test loss", "0.5", "0.55", "10.0% higher"), False),
        (("after shrinking", "", "0.55", "the same as trained"), None),
    ]
    alone = replace(wins, accuracy={"sparse": 0.98})
    assert cells(alone)[0] == (("test accuracy", "", "98.00 %", ""), None)
    assert replace(wins, accuracy={}).comparison[1][0].cells[0] == "outputs after that"


def test_it_prints_on_a_terminal():
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=120)
    console.print(replace(PROOF, notes=("[red]a note[/red]",)))
    text = console.file.getvalue()
    for part in ("0.30 points lower", "2.50 × slower", "not measured: No C++", "[red]a note[/red]", "loses in test"):
        assert part in text


# ---------------------------------------------------------------------- JSON


def test_json_and_back(tmp_path):
    assert Proof.from_json(PROOF.to_json()) == PROOF
    assert Proof.read(PROOF.write(tmp_path / "proof.json")) == PROOF
    assert [path.name for path in tmp_path.iterdir()] == ["proof.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "[" * 100_000, '{"measure": 1}', "\ufffe"])
def test_what_is_no_sheet(text):
    with pytest.raises(ValueError, match="This is no proof sheet"):
        Proof.from_json(text)


@pytest.mark.parametrize(
    "value", [None, "text", float("nan"), float("inf"), True, [], {}, 10**400], ids=lambda value: repr(value)[:8]
)
def test_a_sheet_with_odd_values(value):
    """Each part in turn: refused, or harmless where it may be so."""
    raw = json.loads(PROOF.to_json())
    places = [(raw, key) for key in raw]
    for part in ("facts", "latencies", "units"):
        places += [(raw[part][0], key) for key in raw[part][0]]
    places += [(raw["units"][0]["before"], 0), (raw["accuracy"], "dense"), (raw["notes"], 0)]
    refused = 0
    for holder, key in places:
        old, holder[key] = holder[key], value
        try:
            str(Proof.from_json(json.dumps(raw)))
        except ValueError as error:
            assert "This is no proof sheet" in str(error)  # noqa: PT017
            refused += 1
        holder[key] = old
    assert refused >= len(places) - 12


# ---------------------------------------------------------------------- the measuring


@pytest.fixture(autouse=True)
def _short(monkeypatch) -> None:
    """Timings as short as they come: what is tested here is right whichever wins."""
    monkeypatch.setattr("torch_bregman.inference.choice.SECONDS", 0.0)
    monkeypatch.setattr("torch_bregman.proof.latency.BLOCK", 0.001)


@pytest.fixture
def quick(monkeypatch) -> None:
    """Nothing is optimized, which takes its seconds."""
    monkeypatch.setattr("torch_bregman.proof.measure.optimize_for_inference", lambda model, _: copy.deepcopy(model))


def test_the_figures_of_a_small_network():
    dense, sparse = network(sparse=False).train(), network(sparse=True).train()
    before = {key: value.clone() for key, value in sparse.state_dict().items()}
    steps: list[str] = []
    proof = prove(
        dense, sparse, torch.randn(6, 20), accuracy={"dense": 0.9, "sparse": lambda model: 0.8}, rounds=2,
        batches=(1, 8), rivals=False, progress=steps.append,
    )  # fmt: skip
    assert proof.accuracy == {"dense": 0.9, "sparse": 0.8}
    assert proof.measure == "accuracy"
    kept = int(sparse[0].weight.count_nonzero())
    assert kept == 60  # three rows of 20
    assert proof.density == pytest.approx((60 + 150) / 750)
    facts = {fact.name: fact for fact in proof.facts}
    # The first layer keeps three rows and their biases, the second what reads them.
    assert (facts["parameters"].dense, facts["parameters"].sparse) == (785, 60 + 3 + 15 + 5)
    assert (facts["FLOPs per sample"].dense, facts["FLOPs per sample"].sparse) == (2 * 750, 2 * (60 + 15))
    assert facts["file"].dense > 4 * 785
    assert 4 * 83 < facts["file"].sparse < facts["file"].dense
    # Both layers' outputs at batch 8, and ReLU's beside the first one.
    assert facts["memory at batch 8"].dense == 4 * (785 + 8 * 60)
    assert [(u.layer, u.before, u.after) for u in proof.units] == [("0", (30, 20), (3, 20)), ("2", (5, 30), (5, 3))]
    assert [(row.contender, row.batch) for row in proof.latencies] == [
        (name, batch) for batch in (1, 8) for name in ("dense, PyTorch", "sparse, optimized")
    ]
    assert all(0 < row.p50 <= row.p95 for row in proof.latencies)
    assert all(row.ratio == 1 for row in proof.latencies if row.contender == "sparse, optimized")
    assert proof.difference < 1e-5
    assert any("round 2 of 2" in step for step in steps)
    # Neither network was touched.
    assert dense.training
    assert sparse.training
    assert all(torch.equal(value, before[key]) for key, value in sparse.state_dict().items())
    assert all(p.requires_grad for p in sparse.parameters())


def test_without_a_twin_there_is_no_accuracy_of_one(quick):
    threads = torch.get_num_threads()
    proof = prove(
        None, network(sparse=True), torch.randn(4, 20), accuracy=lambda model: 0.7, rounds=1, batches=(2,), rivals=False
    )
    assert proof.accuracy == {"sparse": 0.7, "shrunk": 0.7, "optimized": 0.7}
    assert proof.facts[0].dense == 785
    assert "there is no dense twin" in proof.notes[0]
    assert torch.get_num_threads() == threads


def test_random_weights_are_dense_and_of_the_usual_size():
    model = build("convnet", (1, 8, 8), 10)
    for module in (model[0], model[3]):
        tb.sparse_init_(module, 0.05, None, torch.Generator().manual_seed(0))
    dense = random_weights(model)
    assert tb.density(dense) == 1
    assert dense[3].weight.std().item() == pytest.approx((64 * 25) ** -0.5, rel=0.02)
    assert tb.density(model) < 1


def test_a_rival_that_cannot_be_had_says_why(quick, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("No C++ compiler was found\n  and a page of details")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    proof = prove(network(sparse=False), network(sparse=True), torch.randn(4, 20), rounds=1, batches=(2,))
    missing = {row.contender: row.missing for row in proof.latencies if row.p50 is None}
    assert missing == {
        "dense, torch.compile": "No C++ compiler was found.",
        "dense, ONNX Runtime": 'onnxruntime is not installed: pip install "torch-bregman[export]".',
        "sparse, ONNX Runtime": 'onnxruntime is not installed: pip install "torch-bregman[export]".',
    }
    assert "not measured: No C++ compiler was found." in str(proof)
    assert proof.verdict.count("torch.compile") == 0


@pytest.mark.slow  # torch.compile takes its time
def test_all_rivals():
    pytest.importorskip("onnxruntime")
    proof = prove(network(sparse=False), network(sparse=True), torch.randn(4, 20), rounds=3, batches=(1, 16))
    assert [row.missing for row in proof.latencies] == [""] * 10
    assert all(row.p50 > 0 for row in proof.latencies)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "`rounds`: 0"),
        ({"rounds": 2.5}, "`rounds`: 2.5"),
        ({"batches": ()}, r"`batches`: \(\)"),
        ({"batches": (0,)}, r"`batches`: \(0,\)"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"Invalid {message}; expected"):
        prove(None, network(sparse=True), torch.randn(4, 20), **options)
    with pytest.raises(ValueError, match="Invalid `example_inputs`"):
        prove(None, network(sparse=True), [])


def conv(*args: object, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(*args, **options)


@pytest.mark.parametrize(
    ("layer", "shape", "flops"),
    [
        (nn.Linear(10, 4), (10,), 2 * 40),
        (nn.Linear(10, 4), (7, 10), 2 * 40 * 7),
        (conv(3, 8, 3), (3, 10, 10), 2 * 8 * 27 * 64),
        (conv(3, 8, 3, padding=1, stride=2), (3, 10, 10), 2 * 8 * 27 * 25),
        (conv(4, 8, 3, groups=4), (4, 10, 10), 2 * 8 * 9 * 64),
        (nn.Conv1d(4, 8, 5), (4, 20), 2 * 8 * 20 * 16),
        (nn.ConvTranspose2d(4, 8, 3, stride=2), (4, 5, 5), 2 * 4 * 8 * 9 * 25),
    ],
)
def test_flops_are_those_of_the_formula(layer, shape, flops):
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(3, *shape)
    assert sizes.flops(layer, (x,)) == flops
    with FlopCounterMode(display=False) as counter:
        layer(x[:1])
    if getattr(layer, "groups", 1) == 1:  # torch counts a grouped convolution as a whole one in some versions
        assert counter.get_total_flops() == flops
    with torch.no_grad():
        layer.weight.view(-1)[::2] = 0
    assert sizes.flops(layer, (x,)) == flops / 2


def test_memory_is_what_is_alive_at_once():
    class Steps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x + 1  # 1
            x = x * 2  # 2, then the first is gone
            y = x.view(-1)[::2]  # a view costs nothing
            x = x.exp_()  # in place
            return y.repeat(4)  # 2 more

    x = torch.randn(1000)
    assert sizes.memory(Steps(), (x,)) == 4 * (1000 + 2000)


def test_what_a_module_holds_is_counted_once():
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(10, 10, bias=False)
            self.again = [self.layer.weight, self.layer.weight.data[2:]]
            self.array = {"a": np.zeros(50, np.int32)}
            self.view = self.array["a"][10:]
            extra = torch.zeros(25)
            self.call = lambda: extra

    assert sizes.held(Holder()) == 4 * (100 + 50 + 25)


def test_memory_of_a_sparse_network_counts_its_lists():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10))
    tb.sparse_init_(model[0], 0.02, None, torch.Generator().manual_seed(0))
    proof = prove(None, model, torch.randn(4, 300), rounds=1, batches=(1,), rivals=False)
    dense = 4 * sum(p.numel() for p in model.parameters())
    memory = proof.facts[-1]
    assert memory.dense == dense + 4 * (200 + 200)
    assert 4 * proof.facts[0].sparse <= memory.sparse


# ---------------------------------------------------------------------- the commands


def do(*args: object) -> None:
    """Run a command that ends well."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, args)])
    assert stop.value.code in (0, None)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """Three epochs of digits with the dense twin."""
    run = tmp_path_factory.mktemp("proof") / "run"
    do("train", "digits", "--epochs", "3", "--lr", "0.05", "--compare", "--quiet", "--out", str(run))
    return run


@pytest.fixture
def run(finished_run, tmp_path, capsys, monkeypatch) -> Path:
    """A copy to write into."""
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()
    return shutil.copytree(finished_run, tmp_path / "run")


def kept_network(run: Path) -> nn.Module:
    model = build("mlp", (1, 8, 8), 10)
    model.load_state_dict(
        load_file(run / "best.safetensors" if (run / "best.safetensors").exists() else run / "last.safetensors")
    )
    return model.eval()


def test_shrink(run, capsys, tmp_path):
    do("shrink", str(run))
    said = capsys.readouterr().out
    assert re.search(r"1 \(Linear\) +200 → \d+", said)
    assert re.search(r"(best|last).safetensors: [\d,]+ bytes, [\d.]+ times as many", said)
    size = (run / "shrunk.safetensors").stat().st_size
    assert f"{size:,} bytes" in said
    small = load_sparse(build("mlp", (1, 8, 8), 10), run / "shrunk.safetensors").eval()
    assert sum(p.numel() for p in small.parameters()) < 29_890
    x, wanted = torch.randn(9, 1, 8, 8), kept_network(run)
    assert torch.allclose(small(x), wanted(x), rtol=1e-4, atol=1e-5)
    do("shrink", str(run), "--out", str(tmp_path / "other"))
    assert (tmp_path / "other").stat().st_size == size


def test_export_onnx_and_program(run, capsys):
    ort = pytest.importorskip("onnxruntime")
    do("export", str(run))
    do("export", str(run), "--format", "program")
    said = capsys.readouterr().out
    for name in ("model.onnx", "model.pt2"):
        assert f"{run / name}: {(run / name).stat().st_size:,} bytes" in said.replace("\n", "")
    x, wanted = torch.randn(9, 1, 8, 8), kept_network(run)
    session = ort.InferenceSession(str(run / "model.onnx"), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    for y in (found, torch.export.load(run / "model.pt2").module()(x)):
        assert torch.allclose(y, wanted(x), rtol=1e-4, atol=1e-5)


def test_export_sparse(run, capsys):
    do("export", str(run), "--format", "sparse")
    exact = (run / "sparse.safetensors").stat().st_size
    model, wanted = build("mlp", (1, 8, 8), 10), kept_network(run)
    load_sparse(model, run / "sparse.safetensors")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in wanted.state_dict().items())
    do("export", str(run), "--format", "sparse", "--dtype", "float16", "--out", str(run / "half"))
    assert (run / "half").stat().st_size < exact
    load_sparse(model, run / "half")
    assert torch.equal(model[1].weight, wanted[1].weight.half().float())
    assert "weights kept" in capsys.readouterr().out


def test_bench(run, capsys):
    do("bench", str(run), "--no-rivals", "--rounds", "2", "--batch", "1,16")
    said = capsys.readouterr().out
    proof = Proof.read(run / "proof.json")
    end, twin = (json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]) for folder in (run, run / "dense"))
    assert proof.measure == "test accuracy"
    assert proof.accuracy["sparse"] == end["test_accuracy"]
    assert proof.accuracy["dense"] == twin["test_accuracy"]
    assert proof.accuracy["shrunk"] == proof.accuracy["optimized"] == end["test_accuracy"]  # measured again
    assert proof.facts[0].dense == 29_890
    assert {row.batch for row in proof.latencies} == {1, 16}
    assert not proof.notes
    for part in ("test accuracy", "the same as trained", "sparse, optimized", str(run / "proof.json"), "report.html"):
        assert part in said
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<h2>Proof</h2>" in page
    assert "figure-units" in page
    assert "after shrinking" in page
    assert re.search(r"\d+ of 200", page)


def test_bench_without_a_finished_twin(quick, run):
    (run / "dense" / "metrics.jsonl").unlink()
    do("bench", str(run), "--no-rivals", "--rounds", "1", "--batch", "1")
    proof = Proof.read(run / "proof.json")
    assert "dense" not in proof.accuracy
    assert any("the dense twin has not been trained to its end" in note for note in proof.notes)


def test_bench_of_an_autoencoder_compares_losses(quick, tmp_path):
    run = tmp_path / "run"
    do("train", "digits", "--model", "autoencoder", "--epochs", "1", "--limit", "64", "--quiet", "--out", str(run))
    do("bench", str(run), "--no-rivals", "--rounds", "1", "--batch", "1")
    proof = Proof.read(run / "proof.json")
    assert proof.measure == "test loss"
    assert proof.accuracy["optimized"] == pytest.approx(proof.accuracy["sparse"], rel=1e-4)


def damaged(run: Path) -> Path:
    for path in run.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    return run


def unfinished(run: Path) -> Path:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    return run


def of_another_model(run: Path) -> Path:
    recipe = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(recipe.replace('model = "mlp"', 'model = "convnet"'))
    return run


def without_weights(run: Path) -> Path:
    for path in run.glob("*.safetensors"):
        path.unlink()
    return run


@pytest.mark.parametrize(
    ("args", "spoil", "message"),
    [
        (["shrink"], lambda run: run / "nowhere", r"nowhere is no run folder"),
        (["export"], lambda run: run.parent, r"is no run folder: there is no recipe.toml"),
        (["bench"], unfinished, r"has not ended; go on with: torch-bregman train --resume"),
        (["shrink"], without_weights, r"There are no weights in .*run"),
        (["shrink"], damaged, r"The weights .*safetensors are damaged"),
        (["export"], of_another_model, r"The weights .*safetensors (are not those of|do not fit) the model convnet"),
        (["shrink", "--out", "/nowhere/x"], None, r"Cannot write /nowhere/x: there is no folder /nowhere"),
        (["export", "--out", "/tmp"], None, r"Cannot write /tmp: it is a folder"),
        (["export", "--format", "onx"], None, r"(?i)onx"),
        (["export", "--dtype", "float16"], None, r"--dtype rounds the values of --format sparse; --format onnx keeps"),
        (["export", "--format", "program", "--out", "net.onnx"], None, r"net.onnx'; expected a name that ends in .pt2"),
        (["bench", "--batch", "1,x"], None, r"Invalid --batch 1,x: expected whole numbers with commas"),
        (["bench", "--batch", "0"], None, r"Invalid `batches`: \(0,\)"),
        (["bench", "--rounds", "0"], None, r"Invalid `rounds`: 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(args, spoil, message, run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([args[0], str(spoil(run) if spoil else run), *args[1:]])
    assert stop.value.code not in (0, None)
    said = capsys.readouterr().err
    assert re.search(message, " ".join(said.replace("│", " ").split())), said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("**/*.tmp*"))


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["shrink"], "shrunk.safetensors"),
        (["export"], "model.onnx"),
        (["export", "--format", "program"], "model.pt2"),
        (["export", "--format", "sparse"], "sparse.safetensors"),
    ],
)
def test_a_full_disk_is_a_sentence(args, name, run, capsys, monkeypatch):
    (run / name).write_bytes(b"old")
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SystemExit) as stop:
        main([args[0], str(run), *args[1:]])
    assert stop.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"{name}: No space left on device; what was there before is untouched" in said
    assert (run / name).read_bytes() == b"old"


def test_a_missing_extra_is_a_sentence(run, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(SystemExit):
        main(["export", str(run)])
    assert 'pip install "torch-bregman[export]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shrink", ("computes the same", "tb.load_sparse", "RUN/shrunk.safetensors")),
        ("export", ("onnxruntime", "torch.export.load", "--dtype float16", "Needs the extra 'export'")),
        ("bench", ("Where the sparse network loses, the table says so", "--no-rivals", "RUN/proof.json")),
    ],
)
def test_help_teaches(name, words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code in (0, None)
    said = " ".join(capsys.readouterr().out.split())
    for word in words:
        assert word in said


# ---------------------------------------------------------------------- the page


def page_of(run: Path) -> str:
    from html.parser import HTMLParser

    class Balanced(HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img", "br", "link"):
                self.open.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    text = write_report(run).read_text(encoding="utf-8")
    parser = Balanced()
    parser.open = []
    parser.feed(text)
    assert not parser.open
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    return text


def test_the_page_holds_the_proof_and_the_picture(run):
    PROOF.write(run / "proof.json")
    page = page_of(run)
    for part in ("<h2>Proof</h2>", "The sparse network loses in test accuracy", '<td class="bad">2.50 × slower</td>',
                 '<td class="good">34.0 × less</td>', "87 of 300", "not measured: No C++ compiler was found.",
                 "measured on a Tuesday"):  # fmt: skip
        assert part in page, part
    assert page.index("<h2>Proof</h2>") < page.index("<h2>How it trained</h2>")


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b'{"measure": "x"}'])
def test_the_page_without_a_proof_or_with_a_damaged_one(run, content):
    if content is not None:
        (run / "proof.json").write_bytes(content)
    page = page_of(run)
    assert "<h2>Proof</h2>" not in page
    assert "<h2>How it trained</h2>" in page
    assert ("proof.json could not be read" in page) == (content is not None)


def test_hostile_names_and_many_layers(run):
    evil = "<script>alert(1)</script>$\\frac{$\x1b[31m\n"
    layers = tuple(Units(evil, evil, (64 + i, 3), (i, 3), evil) for i in range(60))
    facts = (Fact(evil, 0, 0, "", evil), Fact("negative", -1, 5, "B", evil), Fact("large", 1e300, 1, "B", ""))
    hostile = replace(
        PROOF, measure=evil, units=layers, notes=(evil,), facts=facts, accuracy={evil: 1.0, **PROOF.accuracy}
    )
    (run / "proof.json").write_text(hostile.to_json(), encoding="utf-8")
    page = page_of(run)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    assert page.count(" of 12") >= 2  # the 40 widest of 64 to 123 units
    assert "20 of 84" in page
    assert "19 of 83" not in page


def test_the_bars_are_to_scale(tmp_path):
    from torch_bregman.report import plots

    with plots.style():
        (svg,) = plots.units((Units("a", "Linear", (200, 5), (50, 5)), Units("b", "Linear", (100, 200), (100, 50))))
        assert plots.units(()) == []
        assert len(plots.units(tuple(Units(str(i), "Linear", (4, 4), (2, 4)) for i in range(12)))) == 2
    widths = []
    for d in re.findall(r'<path d="M ([^"]*?)z?\s*"[^>]*style="fill: var\(--(?:sparse|dense)\)', svg):
        x = [float(number) for number in re.findall(r"[-\d.]+", d)][::2]
        widths.append(max(x) - min(x))
    assert [width / max(widths) for width in widths] == pytest.approx([1, 0.25, 0.5, 0.5], abs=1e-3)
    assert math.isclose(max(widths), plots.WIDTH - plots.RIGHT - 2, rel_tol=1e-3)
