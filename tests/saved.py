"""The networks, optimizers and loops behind tests/data/v0.1.0: what made those files, and what loads them."""

import torch
from torch import nn
from torch.nn import functional as F

import torch_bregman as tb

STEPS, MORE = 8, 5  # before the state was saved, and after it


def mlp():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))


def convnet():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def images(model):
    return any(isinstance(m, nn.Conv2d) for m in model.modules())


def data(model):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(48, 1, 6, 6, generator=generator) if images(model) else torch.randn(48, 12, generator=generator)
    return x, x.flatten(1)[:, :3].argmax(1)


def groups(model, regularizer, lam):
    return tb.param_groups(model, regularizer, lam)


INDEX = torch.arange(16)[:, None] // 2

#: name → (network, what is alive at the start, optimizer of a network)
CASES = {
    "linbreg": (mlp, {}, lambda m: tb.LinBreg(groups(m, tb.L1(), 0.05), 0.5, momentum=0.9)),
    "linbreg-sgd": (
        mlp,
        {},
        lambda m: tb.LinBreg(groups(m, tb.L1(), 0.05), 0.1, momentum=0.9, momentum_rule="sgd", nesterov=True),
    ),
    "linbreg-nuclear": (mlp, {}, lambda m: tb.LinBreg(groups(m, tb.NuclearNorm(prox_every=2), 0.05), 0.2)),
    "adabreg-rows": (mlp, {"groups": "rows"}, lambda m: tb.AdaBreg(groups(m, tb.GroupL1("rows"), 0.02), 0.02)),
    "adabreg-index": (
        mlp,
        {},
        lambda m: tb.AdaBreg(groups(m, {"0": tb.SparseGroupL1(INDEX, 0.3), "2": tb.NonNegativeL1()}, 0.02), 0.02),
    ),
    "adabreg-kernels": (
        convnet,
        {"groups": "kernels"},
        lambda m: tb.AdaBreg(groups(m, {nn.Conv2d: tb.GroupL1("kernels"), nn.Linear: tb.L1()}, 0.02), 0.02),
    ),
    "proxsgd": (mlp, {}, lambda m: tb.ProxSGD(groups(m, tb.L1(), 0.05), 0.1, momentum=0.9, nesterov=True)),
    "control": (mlp, {}, lambda m: tb.AdaBreg(groups(m, tb.L1(), 0.0), 0.02)),
    "levels": (mlp, {}, lambda m: tb.AdaBreg(groups(m, tb.L1(), 0.0), 0.02)),
    "levels-rows": (mlp, {"groups": "rows"}, lambda m: tb.AdaBreg(groups(m, tb.GroupL1("rows"), 0.02), 0.02)),
}


def make(name):
    """Network, optimizer, and what else is stepped: a controller, multilevel training."""
    network, start, optimizer_of = CASES[name]
    torch.manual_seed(1)
    model = tb.sparse_init_(network(), 0.3, **start)
    optimizer = optimizer_of(model)
    also = []
    if name in ("control", "levels"):
        also.append(tb.TargetDensity(optimizer, 0.2, total_steps=40))
    if name.startswith("levels"):
        also.append(tb.Multilevel(model, optimizer, coarse_steps=5, margin=1.0 if name == "levels" else None))
    return model, optimizer, also


def train(model, optimizer, also, steps):
    x, y = data(model)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        for one in also:
            one.step()


class Attending(nn.Module):
    """Tokens through an embedding, attention of several heads, and a tied head."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 7, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, x):
        y = self.tokens(x)
        return self.out(self.norm(y + self.attention(y, y, y)[0]))


class Heads(nn.Module):
    """Attention by hand, whose sizes stand in the code."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).view(x.size(0), x.size(1), 3, 4, 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(x.size(0), x.size(1), 8))


def embedded():
    return nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(18, 8), nn.ReLU(), nn.Linear(8, 2))


def grouped():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.ConvTranspose2d(8, 3, 2),
    )  # fmt: skip


@torch.no_grad()
def prepared(name):
    """A network, what it takes, and whether its file is of what `shrink` makes of it."""
    torch.manual_seed(2)
    generator = torch.Generator().manual_seed(4)
    if name in ("mlp", "mlp-bfloat16", "mlp-shrunk", "mlp-rank"):
        model, x = mlp(), torch.randn(5, 12, generator=generator)
        if name == "mlp-rank":
            model[0].weight.copy_(torch.randn(16, 2) @ torch.randn(2, 12))
        else:
            tb.sparse_init_(model, 0.2, groups="rows" if "shrunk" in name else None)
    elif name == "conv-shrunk":
        model, x = convnet().eval(), torch.randn(5, 1, 6, 6, generator=generator)
        model[0].weight[1:3] = 0
        model[3].weight[:2] = 0
    elif name == "grouped-shrunk":
        model, x = grouped().eval(), torch.randn(3, 2, 5, 5, generator=generator)
        model[0].weight[2:4] = 0
        model[5].weight[5] = 0
    elif name == "attention-shrunk":
        model, x = Attending().eval(), torch.randint(0, 7, (3, 4), generator=generator)
        model.attention.in_proj_weight[16:20] = 0
    elif name == "heads-shrunk":
        model, x = Heads().eval(), torch.randn(3, 4, 8, generator=generator)
        model.qkv.weight[16:20] = 0
        model.qkv.bias[16:20] = 0
    else:
        model, x = embedded(), torch.randint(0, 9, (5, 3), generator=generator)
        model[2].weight[:4] = 0
        model[0].weight[:, 3] = 0.5
    return model, x, name.endswith(("shrunk", "rank"))


FILES = {
    "mlp": mlp, "mlp-bfloat16": mlp, "mlp-shrunk": mlp, "mlp-rank": mlp, "conv-shrunk": convnet,
    "grouped-shrunk": grouped, "attention-shrunk": Attending, "heads-shrunk": Heads, "embedding-shrunk": embedded,
}  # fmt: skip

SMALLNET = """from torch import nn


def net(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, classes))
"""
#: runs of digits, by the name of their folder
RUNS = {
    "stopped": {"density": 0.1, "epochs": 4, "limit": 300},
    "stopped-multilevel": {
        "density": 0.1, "epochs": 4, "limit": 300, "multilevel": True, "coarse_steps": 3, "optimizer": "linbreg",
        "momentum": 0.9, "lr": 0.1,
    },
    "stopped-rigl": {"density": 0.1, "epochs": 4, "limit": 300, "optimizer": "rigl"},
    "ended": {"density": 0.1, "epochs": 2, "limit": 300, "regularizer": "group-l1"},
}  # fmt: skip
