"""Measuring a model: perplexity."""

from .perplexity import perplexity

__all__ = ["perplexity"]
