"""Text to token windows, for calibration and for perplexity."""

from .prompts import Prompts, load_prompts
from .texts import Text, load_text
from .windows import Windows, contiguous_windows, draw_windows

__all__ = ["Prompts", "Text", "Windows", "contiguous_windows", "draw_windows", "load_prompts", "load_text"]
