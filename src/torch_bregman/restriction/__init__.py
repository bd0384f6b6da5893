"""Training on the live part of a network: products that touch nothing else, and the compact network."""

from .csr import Pattern, sparse_linear

__all__ = ["Pattern", "sparse_linear"]
