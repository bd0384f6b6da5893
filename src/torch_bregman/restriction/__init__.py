"""The live part of a network: its support, the way there and back, and products that touch nothing else."""

from .csr import Pattern, sparse_linear
from .support import Support, beyond, elementwise, restricted_regularizer, separable, support

__all__ = [
    "Pattern",
    "Support",
    "beyond",
    "elementwise",
    "restricted_regularizer",
    "separable",
    "sparse_linear",
    "support",
]
