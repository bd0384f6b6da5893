"""Networks inside torch.compile, data parallelism and averages: what leaves the library is the network itself."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import torch_bregman as tb
from torch_bregman.export.file import METADATA
from torch_bregman.inference import choice
from torch_bregman.network.wrapped import bare, inwards, is_average
from torch_bregman.proof import prove


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "AveragedModel": AveragedModel,
    "torch.compile": compiled,
    "an average of a parallel one": lambda model: AveragedModel(DistributedDataParallel(model)),
}


@pytest.fixture(autouse=True)
def _group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one, which DistributedDataParallel wants."""
    monkeypatch.setattr(choice, "SECONDS", 0.0)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    tb.sparse_init_(model, 0.3)
    with torch.no_grad():
        model[0].weight[3] = model[0].bias[3] = 0  # type: ignore[index]
    return model


X = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))


class Own(nn.Module):
    """A network whose parts have the names that wrappers use."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.more = nn.Linear(20, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.more(self.module(x))


class Around(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.module(x)


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_network_inside(name: str) -> None:
    model = WRAPPERS[name](network())
    assert type(bare(model)) is nn.Sequential
    assert inwards(model)[0] is model
    assert is_average(model) == ("verage" in name)


def test_a_class_of_the_users_own_is_no_wrapper(tmp_path: Path) -> None:
    for model in (Own(), Around(nn.Linear(20, 4))):
        assert bare(model) is model
        tb.save_sparse(model, tmp_path / "net.st")
        fresh = type(model)(*([nn.Linear(20, 4)] if isinstance(model, Around) else []))
        assert torch.equal(tb.load_sparse(fresh, tmp_path / "net.st")(X), model(X))


def test_wrappers_are_known_by_the_names_of_their_classes() -> None:
    """Those of libraries that need not be installed."""
    for place in ("timm.utils.model_ema", "lightning.fabric.wrappers"):
        name = "ModelEmaV3" if place.startswith("timm") else "_FabricModule"
        model = type(name, (Around,), {"__module__": place})(nn.Linear(2, 2))
        assert bare(model) is model.module
        assert is_average(model) == place.startswith("timm")


@pytest.mark.parametrize("name", WRAPPERS)
def test_files_are_those_of_the_network(name: str, tmp_path: Path) -> None:
    wrap, path = WRAPPERS[name], tmp_path / "net.st"
    model = network()
    wrapped = wrap(model)
    said = str(tb.save_sparse(wrapped, path))
    assert ("tb.prune_(model, density)" in said) == ("verage" in name)
    assert f"of {30 * 24} weights kept" in said
    for fresh in (network(1), wrap(network(1))):
        assert tb.load_sparse(fresh, path) is fresh
        assert all(torch.equal(a, b) for a, b in zip(bare(fresh).parameters(), model.parameters(), strict=True))
    tb.save_sparse(model, path)
    loaded = tb.load_sparse(wrap(network(1)), path)
    assert torch.equal(bare(loaded)(X), model(X))


@pytest.mark.parametrize("name", WRAPPERS)
def test_smaller_layers_are_put_into_a_wrapped_network(name: str, tmp_path: Path) -> None:
    wrap, path = WRAPPERS[name], tmp_path / "net.st"
    small = tb.shrink(network(), (X,)).model
    tb.save_sparse(small, path)
    wrapped = wrap(network(1))
    if any(isinstance(module, DistributedDataParallel) for module in inwards(wrapped)):
        with pytest.raises(ValueError, match="load into the network before it is wrapped"):
            tb.load_sparse(wrapped, path)
    else:
        torch.testing.assert_close(bare(tb.load_sparse(wrapped, path))(X), small(X))


@pytest.mark.parametrize("name", ["DataParallel", "AveragedModel", "an average of a parallel one"])
def test_files_of_earlier_versions_that_hold_the_wrapper(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = tmp_path / "net.st", network()
    with monkeypatch.context() as earlier:
        earlier.setattr("torch_bregman.export.save.bare", lambda model: model)
        tb.save_sparse(WRAPPERS[name](model), path)
    assert b"module.0.weight" in path.read_bytes()
    assert METADATA.encode() in path.read_bytes()
    for fresh in (network(1), WRAPPERS[name](network(1))):
        assert torch.equal(bare(tb.load_sparse(fresh, path))(X), model(X))


@pytest.mark.parametrize("name", WRAPPERS)
def test_shrink_works_on_the_network_inside(name: str) -> None:
    model = network()
    small = tb.shrink(WRAPPERS[name](model), (X,))
    assert type(small.model) is nn.Sequential
    assert [row.name for row in small.report.rows] == ["0", "2"]
    assert small.model[0].out_features < 30
    torch.testing.assert_close(small.model(X), model(X))
    assert ("tb.prune_" in str(small.report)) == ("verage" in name)


def test_an_optimizer_of_a_wrapped_network_goes_on() -> None:
    model = DistributedDataParallel(network())
    optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1(), lam=0.1), lr=1e-2)
    small = tb.shrink(model, (X,), optimizer)
    assert small.optimizer is not None
    assert {id(p) for group in small.optimizer.param_groups for p in group["params"]} == {
        id(p) for p in small.model.parameters()
    }


@pytest.mark.parametrize("name", WRAPPERS)
def test_inference_on_the_network_inside(name: str) -> None:
    model = network().eval()
    fast = tb.optimize_for_inference(WRAPPERS[name](model), (X,))
    torch.testing.assert_close(fast(X), model(X))
    assert not any(isinstance(module, nn.DataParallel | DistributedDataParallel) for module in fast.modules())


@pytest.mark.parametrize("name", ["DataParallel", "AveragedModel", "torch.compile"])
def test_programs_of_the_network_inside(name: str, tmp_path: Path) -> None:
    model = network().eval()
    wrapped = WRAPPERS[name](model)
    loaded = torch.export.load(tb.save_program(wrapped, X, tmp_path / "net.pt2")).module()
    torch.testing.assert_close(loaded(X), model(X))
    pytest.importorskip("onnxscript")
    tb.save_onnx(wrapped, X, tmp_path / "net.onnx")


def test_a_proof_of_averages() -> None:
    proof = prove(AveragedModel(network()), AveragedModel(network()), X, rounds=1, batches=(1,), rivals=False)
    assert any("tb.prune_" in note for note in proof.notes)
    alive = sum(int(layer.weight.count_nonzero()) for layer in network() if isinstance(layer, nn.Linear))
    (fact,) = (fact for fact in proof.facts if fact.name == "weights")
    assert (fact.dense, fact.sparse) == (alive, alive)
    assert f"{alive / 720:.2%} of 720; these are 720 of 720 matrix entries" in str(proof)


@pytest.mark.parametrize(
    "function",
    [
        lambda model: tb.optimize_for_inference(model, (X,)),
        lambda model: tb.shrink(model, (X,)),
        lambda model: prove(None, model, X, rounds=1, rivals=False),
        lambda model: prove(model, network(), X, rounds=1, rivals=False),
    ],
)
def test_pruned_networks_are_refused_with_the_remedy(function: Callable[[nn.Module], object]) -> None:
    model = network()
    prune.l1_unstructured(model[0], "weight", 0.5)
    model(X)  # from now on its weight is a tensor that torch cannot copy
    with pytest.raises(ValueError, match=r"0.weight is computed .* first call torch.nn.utils.prune.remove\("):
        function(model)


def test_programs_of_pruned_networks(tmp_path: Path) -> None:
    model = network().eval()
    prune.l1_unstructured(model[0], "weight", 0.5)
    wanted = model(X)
    loaded = torch.export.load(tb.save_program(model, X, tmp_path / "net.pt2")).module()
    torch.testing.assert_close(loaded(X), wanted)


def test_a_twin_whose_weights_nobody_could_count_is_refused() -> None:
    class Packed(nn.Linear):
        def get_extra_state(self) -> int:
            return 3

    with pytest.raises(ValueError, match=r"Invalid `dense`: 0 \(Packed\) has an extra state"):
        prove(nn.Sequential(Packed(20, 4)), nn.Sequential(nn.Linear(20, 4)), X, rounds=1, rivals=False)


def test_flattened_shards_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import fsdp

    class Sharded(nn.Sequential):
        """In the place of FullyShardedDataParallel, which wants a GPU."""

    monkeypatch.setattr(fsdp, "FullyShardedDataParallel", Sharded)
    for function in (tb.save_sparse, tb.load_sparse):
        with pytest.raises(ValueError, match=f"has FullyShardedDataParallel, and tb.{function.__name__} needs whole"):
            function(nn.Sequential(Sharded(network())), tmp_path / "net.st")
    with pytest.raises(ValueError, match=r"has FullyShardedDataParallel, and tb.shrink needs whole"):
        tb.shrink(Sharded(network()), (X,))
    with pytest.raises(ValueError, match=r"has FullyShardedDataParallel, and tb.optimize_for_inference needs whole"):
        tb.optimize_for_inference(Sharded(network()), (X,))
    with pytest.raises(ValueError, match=r"has FullyShardedDataParallel, and an export needs whole"):
        tb.save_program(Sharded(network()), X, tmp_path / "net.pt2")


class Annotated(nn.Module):
    """Sizes in the code, so that the smaller network is a GraphModule, and annotations that are strings here."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 6, 3), nn.Linear(24, 3)
        with torch.no_grad():
            self.conv.weight[2:4] = self.conv.bias[2:4] = 0  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().view(-1, 24))


def test_smaller_networks_can_be_pickled() -> None:
    x = torch.randn(3, 1, 4, 4)
    small = tb.shrink(Annotated(), (x,)).model
    assert isinstance(small, torch.fx.GraphModule)
    torch.testing.assert_close(pickle.loads(pickle.dumps(small))(x), small(x))
