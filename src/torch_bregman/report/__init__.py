"""What a person looks at after a run: one HTML page, and a few lines on the terminal."""

from torch_bregman.report.html import write_report
from torch_bregman.report.patterns import weight_pattern
from torch_bregman.report.summary import terminal_summary

__all__ = ["terminal_summary", "weight_pattern", "write_report"]
