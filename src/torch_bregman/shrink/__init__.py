"""Shrinking: the same outputs from a smaller network, and an optimizer that goes on with it."""

from .report import Report, Row
from .smaller import Shrunk, compact, shrink

__all__ = ["Report", "Row", "Shrunk", "compact", "shrink"]
