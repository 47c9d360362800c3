"""Evaluation of a model: perplexity, zero-shot accuracy and speed."""

from .perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
