"""Measuring a model: perplexity and zero-shot accuracy."""

from .perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
