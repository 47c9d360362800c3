"""Evaluation of a model: perplexity, zero-shot accuracy and speed."""

from .divergence import Around, Comparison, Divergence, dense_states
from .perplexity import Perplexity, perplexity, whole_answers

__all__ = ["Around", "Comparison", "Divergence", "Perplexity", "dense_states", "perplexity", "whole_answers"]
