"""Small tokenizers, built here: one token per letter, and BOS as families of models have it."""

from __future__ import annotations

from string import ascii_lowercase

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, UNKNOWN = 0, 1, 2


def build_tokenizer(bos: str | None = "<bos>", adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer of letters between spaces, 29 tokens in all.

    Args:
        bos: spelling of its BOS token, with id 0; None: it has none.
        adds_bos: whether it puts BOS at the start of each text, as the tokenizers of Llama and Gemma do.
    """
    vocabulary = {bos or "<unused>": BOS, "<eos>": EOS, "<unk>": UNKNOWN}
    vocabulary |= {letter: i for i, letter in enumerate(ascii_lowercase, start=3)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos is not None and adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="<eos>", unk_token="<unk>")


def letters(ids: list[int]) -> str:
    """Return token ids as text: ``^`` for BOS."""
    return "".join({BOS: "^", EOS: "$", UNKNOWN: "?"}.get(i) or ascii_lowercase[i - 3] for i in ids)
