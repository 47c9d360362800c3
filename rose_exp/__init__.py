"""One-shot pruning of large language models: methods, orders and honest baselines on one engine."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("rose_exp")
except PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "0+unknown"
