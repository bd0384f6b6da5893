"""The live part of a network: its pattern, and products that touch nothing else."""

from .csr import Pattern, sparse_linear

__all__ = ["Pattern", "sparse_linear"]
