"""Inference that computes with the live weights where that measured faster."""

from .chain import Chain
from .optimize import InferenceModule, optimize_for_inference
from .report import InferenceReport, LayerChoice

__all__ = ["Chain", "InferenceModule", "InferenceReport", "LayerChoice", "optimize_for_inference"]
