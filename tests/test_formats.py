"""Files for other programs: what they compute is what the network computes, or there is no file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_bregman import compare, sparse_init_
from torch_bregman.export import formats
from torch_bregman.export.formats import save_onnx, save_program
from torch_bregman.layers import weight_layers
from torch_bregman.models import build
from torch_bregman.models.resnet import ResNet

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

SHAPES = {"mlp": (1, 8, 8), "convnet": (1, 8, 8), "resnet": (3, 8, 8)}
SAVE = {".onnx": save_onnx, ".pt2": save_program}


def network(name: str) -> nn.Module:
    """Sparse, in train mode, with statistics in its norms that are not those of a fresh one."""
    torch.manual_seed(0)
    model = ResNet(3, 10, width=8) if name == "resnet" else build(name, SHAPES[name], 10)
    for i, (_, module, _) in enumerate(weight_layers(model)):
        sparse_init_(module, 0.3, None, torch.Generator().manual_seed(i))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.bias)
    return model.train()


def run_onnx(path: Path, *inputs: Tensor) -> list[Tensor]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, given)]


def near(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("name", SHAPES)
def test_onnx_computes_the_same_at_any_batch_size(name, tmp_path):
    model, shape = network(name), SHAPES[name]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = save_onnx(model, torch.randn(1, *shape), tmp_path / "net.onnx")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]  # no external data, nothing temporary
    written = onnx.load(str(path))
    for entry, label in ((written.graph.input[0], "input"), (written.graph.output[0], "output")):
        assert entry.name == label
        assert entry.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert sum(i.data_location == onnx.TensorProto.EXTERNAL for i in written.graph.initializer) == 0
    model.eval()
    for batch in (1, 2, 7, 64):
        x = torch.randn(batch, *shape)
        near(run_onnx(path, x)[0], model(x).detach())


def test_programs_run_without_the_project(tmp_path):
    """Also shrunk ones, whose modules may be the project's own."""
    from torch_bregman.shrink import shrink

    models, x = {}, {}
    for name, shape in SHAPES.items():
        models[name] = network(name).eval()
        small = shrink(models[name], (torch.randn(2, *shape),)).model.train()
        save_program(small, torch.randn(1, *shape), tmp_path / f"{name}.pt2")
        assert small.training
        x[name] = [torch.randn(batch, *shape) for batch in (1, 5)]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(f"{name}.pt2" for name in SHAPES)
    torch.save(x, tmp_path / "x.pt")
    script = (
        "import sys; sys.modules['torch_bregman'] = None\n"
        "import torch\n"
        "def run(name, x):\n"
        "    program = torch.export.load(f'{name}.pt2').module()\n"
        "    return [program(one) for one in x]\n"
        "torch.save({name: run(name, x) for name, x in torch.load('x.pt').items()}, 'y.pt')\n"
        "assert not [name for name in sys.modules if name.startswith('torch_bregman.')]\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    y = torch.load(tmp_path / "y.pt")
    for name, model in models.items():
        for given, found in zip(x[name], y[name], strict=True):
            near(found, model(given).detach())


class Several(nn.Module):
    """Two inputs, one of them positions in a table, *args, and a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(7, 3), nn.Linear(3, 2)

    def forward(self, words: Tensor, *more: Tensor) -> dict[str, Tensor]:
        return {"a": self.layer(self.table(words)), "b": 2 * more[0]}


def test_several_inputs_and_outputs(tmp_path):
    torch.manual_seed(0)
    model = Several()
    inputs = torch.randint(7, (4, 5)), torch.randn(4)
    path = save_onnx(model, inputs, tmp_path / "net.onnx")
    graph = onnx.load(str(path)).graph
    assert [entry.name for entry in graph.input] == ["input_0", "input_1"]
    assert [entry.name for entry in graph.output] == ["output_0", "output_1"]
    loaded = torch.export.load(save_program(model, inputs, tmp_path / "net.pt2")).module()
    words, more = torch.randint(7, (3, 5)), torch.randn(3)
    wanted = model(words, more)
    for found in (run_onnx(path, words, more), list(loaded(words, more).values())):
        near(found[0].detach(), wanted["a"].detach())
        near(found[1], wanted["b"])


def test_the_values_of_the_example_are_not_in_the_file(tmp_path):
    secret = torch.full((2, 3), 1234.5678)
    for ending, save in SAVE.items():
        path = save(nn.Linear(3, 2), secret, tmp_path / f"net{ending}")
        assert secret[0].numpy().tobytes() not in path.read_bytes()


class ByValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)


@pytest.mark.parametrize("ending", SAVE)
@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (ByValue(), torch.ones(2, 3), r"`model` cannot be exported: its path depends on the values .*test_formats.py"),
        (FixedBatch(), torch.ones(2, 3), r"`model` cannot be exported: it works with one batch size only"),
        (Noisy(), torch.ones(2, 999), r"differs from the network by .* of the largest output at batch size"),
        (nn.Linear(3, 2), torch.ones(2, 4), r"cannot be called on `example_inputs` \(2, 4\): mat1 and mat2"),
        (nn.Linear(3, 2), (), r"`example_inputs`: nothing; expected a tensor"),
        (nn.Linear(3, 2), ("x",), r"`example_inputs`: str; expected a tensor"),
        (nn.Linear(3, 2), torch.ones(0, 3), r"`example_inputs`: shapes \(0, 3\); expected one batch"),
        (nn.Linear(3, 2), (torch.ones(2, 3), torch.ones(3, 3)), r"shapes \(2, 3\), \(3, 3\); expected one batch"),
        (len, torch.ones(2, 3), r"`model`: builtin_function_or_method; expected a torch.nn.Module"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_be_exported_leaves_no_file(ending, model, inputs, message, tmp_path, capfd):
    path = tmp_path / f"net{ending}"
    path.write_bytes(b"what was there before")
    with pytest.raises(ValueError, match=message):
        SAVE[ending](model, inputs, path)
    assert path.read_bytes() == b"what was there before"
    assert list(tmp_path.iterdir()) == [path]
    assert capfd.readouterr() == ("", "")  # the reason is in the error, not on the screen


class Values(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x.T @ x) + x


class Histogram(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.histc(x, 4) + x.sum()


class Cache:
    """As the cache of a language model: no tensor, and none that torch knows."""


class Caches(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Cache]:
        return super().forward(x), Cache()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Values(), r"aten\._linalg_eigh in 1 \(Values\): ONNX has no operator for it; write it with other operations"),
        (
            Histogram(),
            r"aten\.histc in 1 \(Histogram\): .*min == max.*; write it with other operations, or use save_pro",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_onnx_does_not_have_is_named_with_its_module(model, message, tmp_path):
    network = nn.Sequential(nn.Linear(3, 3), model)
    with pytest.raises(ValueError, match=f"`model` cannot be written as ONNX: {message}") as caught:
        save_onnx(network, torch.ones(2, 3), tmp_path / "net.onnx")
    assert "\x1b" not in str(caught.value)  # colours of a terminal
    assert str(caught.value).count("\n") == 0
    save_program(network, torch.ones(2, 3), tmp_path / "net.pt2")


@pytest.mark.parametrize("ending", SAVE)
def test_what_is_returned_beside_tensors_is_named(ending, tmp_path):
    with pytest.raises(ValueError, match=r"it returns a Cache, which torch.export does not know; .*use_cache = False"):
        SAVE[ending](Caches(3, 2), torch.ones(2, 3), tmp_path / f"net{ending}")


@pytest.mark.parametrize("opset", [3, 17, 99, 20.0, True])
def test_a_wrong_opset(opset, tmp_path):
    with pytest.raises(ValueError, match=r"Invalid `opset`: .*; expected"):
        save_onnx(nn.Linear(3, 2), torch.ones(2, 3), tmp_path / "net.onnx", opset=opset)


@pytest.mark.parametrize("opset", [18, 22])
def test_another_opset(opset, tmp_path):
    path = save_onnx(nn.Linear(3, 2), torch.ones(2, 3), tmp_path / "net.onnx", opset=opset)
    assert [entry.version for entry in onnx.load(str(path)).opset_import if not entry.domain] == [opset]


def test_a_wrong_ending(tmp_path):
    with pytest.raises(ValueError, match=r"Invalid `path`: .*net.pt'; expected a name that ends in .pt2"):
        save_program(nn.Linear(3, 2), torch.ones(2, 3), tmp_path / "net.pt")


@pytest.mark.parametrize("ending", SAVE)
def test_a_folder_that_is_not_there_is_named(ending, tmp_path):
    path = tmp_path / "nowhere" / f"net{ending}"
    with pytest.raises(FileNotFoundError, match=str(path)):
        SAVE[ending](nn.Linear(3, 2), torch.ones(2, 3), path)


@pytest.mark.parametrize("ending", SAVE)
def test_a_full_disk_leaves_what_was_there(ending, tmp_path, monkeypatch):
    path = tmp_path / f"net{ending}"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        SAVE[ending](nn.Linear(3, 2), torch.ones(2, 3), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_extra_is_named(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r'onnx.* is needed here: pip install "torch-bregman\[export\]"'):
        save_onnx(nn.Linear(3, 2), torch.ones(2, 3), tmp_path / "net.onnx")


def test_without_onnxruntime_the_file_is_written_unrun(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    path = save_onnx(nn.Linear(3, 2), torch.ones(2, 3), tmp_path / "net.onnx")
    onnx.checker.check_model(str(path))


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    runner = formats._onnx_runner
    monkeypatch.setattr(formats, "_onnx_runner", lambda path: lambda x: [y * (1 + 3e-5) for y in runner(path)(x)])
    with pytest.raises(ValueError, match=r"The ONNX file differs from the network by 3e-05 .*; 1e-05 is allowed"):
        save_onnx(nn.Linear(3, 2), torch.ones(2, 3), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_the_difference_of_outputs():
    one = torch.tensor([1.0, -2.0])
    assert compare.difference(one, one) == 0
    assert compare.difference(one + torch.tensor([0.0, 0.02]), one) == pytest.approx(0.01)
    assert compare.difference(one[:1], one) == torch.inf
    assert compare.difference(torch.zeros(2), torch.zeros(2)) == 0
    assert compare.difference(torch.ones(2), torch.zeros(2)) == torch.inf
    assert compare.difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == torch.inf
    wild = torch.tensor([1.0, torch.inf, torch.nan])
    assert compare.difference(wild, wild) == 0
    assert compare.difference(torch.zeros(3), wild) == torch.inf
    assert not compare.difference(torch.full((2,), torch.nan), one) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_number_formats(dtype, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Linear(30, 20).to(dtype), torch.randn(4, 30).to(dtype)
    found = run_onnx(save_onnx(model, x, tmp_path / "net.onnx"), x)[0]
    assert found.dtype == dtype
    assert (found - model(x)).abs().max() <= 4 * torch.finfo(dtype).eps * model(x).abs().max()
