"""Train neural networks sparse from the first step with Bregman iterations."""

from .control import TargetDensity
from .density import density, sparsity_report
from .export.formats import save_onnx, save_program
from .export.load import load_sparse
from .export.read import read_sparse
from .export.save import save_sparse
from .inference import optimize_for_inference
from .init import sparse_init_
from .layers import param_groups
from .multilevel import Multilevel
from .optim import AdaBreg, LinBreg, ProxSGD
from .proof import prove
from .pruning import prune_
from .regularizers import L1, GroupL1, NonNegativeL1, NuclearNorm, Regularizer, SparseGroupL1
from .shrink import shrink
from .theory import bregman_distance, step_size_bound, symmetric_bregman_distance

__version__ = "0.1.0"

__all__ = [
    "L1",
    "AdaBreg",
    "GroupL1",
    "LinBreg",
    "Multilevel",
    "NonNegativeL1",
    "NuclearNorm",
    "ProxSGD",
    "Regularizer",
    "SparseGroupL1",
    "TargetDensity",
    "bregman_distance",
    "density",
    "load_sparse",
    "optimize_for_inference",
    "param_groups",
    "prove",
    "prune_",
    "read_sparse",
    "save_onnx",
    "save_program",
    "save_sparse",
    "shrink",
    "sparse_init_",
    "sparsity_report",
    "step_size_bound",
    "symmetric_bregman_distance",
]
