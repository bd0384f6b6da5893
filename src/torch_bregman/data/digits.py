"""The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn brings: works without a connection."""

from __future__ import annotations

from torch_bregman.data.errors import missing_extra
from torch_bregman.data.splits import Raw


def read() -> Raw:
    """Images [1797, 1, 8, 8] in [0, 1], all in one pair: a fifth becomes the test split, a tenth validation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_extra("The data set digits", "scikit-learn") from error
    bunch = load_digits()
    return Raw("digits", (bunch.images[:, None] / 16, bunch.target), tuple("0123456789"))
