"""``python -m rose_exp`` is ``rose-exp``."""

from .app import main

main()
