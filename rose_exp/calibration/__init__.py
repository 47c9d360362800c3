"""Text to token windows, for calibration and for perplexity."""

from .texts import Text, load_text
from .windows import Windows, contiguous_windows, draw_windows

__all__ = ["Text", "Windows", "contiguous_windows", "draw_windows", "load_text"]
