"""``python -m rose_exp`` is ``rose-exp``."""

from .runtime import quiet  # noqa: F401  isort: skip

from .cli.entry import main

if __name__ == "__main__":
    main()
