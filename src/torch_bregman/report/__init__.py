"""What a person looks at: of a run one HTML page and a few lines on the terminal, in a loop of one's own a picture.

`picture(model)` shows the density of each layer and where its weights are alive; `weight_pattern(weight)` is where one
weight is alive as an array, for a logger of images.
"""

from torch_bregman.report.html import write_report
from torch_bregman.report.network import picture
from torch_bregman.report.patterns import weight_pattern
from torch_bregman.report.summary import terminal_summary

__all__ = ["picture", "terminal_summary", "weight_pattern", "write_report"]
