"""Imported before anything that draws progress bars: none in a pipe, and none in all but the first of several processes."""

from __future__ import annotations

import os
import sys

if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
    os.environ.setdefault("TQDM_DISABLE", "1")
