"""``python -m rose_exp`` is ``rose-exp``."""

from . import quiet  # noqa: F401  isort: skip

from .entry import main

if __name__ == "__main__":
    main()
