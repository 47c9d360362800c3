"""Disables progress bars outside a terminal, and in all processes of ``torchrun`` but the first.

Import this module before any library that draws progress bars.
"""

from __future__ import annotations

import os
import sys

if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
    os.environ.setdefault("TQDM_DISABLE", "1")
