"""The one exception of this package."""


class DataError(Exception):
    """What is wrong with a data set, in one sentence: the argument or file, what was found, what was expected."""


def missing_extra(what: str, package: str) -> DataError:
    """The error for `what` needing `package`, which is not installed."""
    return DataError(f'{what} needs {package}, which is not installed: pip install "torch-bregman[train]"')
