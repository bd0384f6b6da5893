"""The program that the commands belong to."""

from cyclopts import App

from .. import __version__

REFRESH = 2  # times a second, of what is shown meanwhile; more would disturb what is timed

app = App(
    name="torch-bregman",
    version=__version__,
    help="Train neural networks sparse from the first step with Bregman iterations.",
)
