"""Stop requests at a chosen place of a pruning pass."""

from __future__ import annotations

import pytest

from rose_exp.pruning import PruningPlan
from rose_exp.runtime import signals


def stop_after_solving(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Request a stop, as a signal does, when the ``count``-th group of layers is solved. ``monkeypatch.undo()`` revokes it."""
    solved, original = 0, PruningPlan.solve

    def solve(self, *arguments, **keywords):
        nonlocal solved
        solved += 1
        if solved == count:
            monkeypatch.setattr(signals._stop, "signal", "SIGTERM")
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(PruningPlan, "solve", solve)
