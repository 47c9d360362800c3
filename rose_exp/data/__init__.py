"""Texts, token windows and prompts for calibration and evaluation."""

from .prompts import Prompts, load_prompts
from .texts import Text, load_text
from .windows import Windows, contiguous_windows, draw_windows

__all__ = ["Prompts", "Text", "Windows", "contiguous_windows", "draw_windows", "load_prompts", "load_text"]
