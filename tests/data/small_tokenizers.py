"""Small tokenizers with one token per letter and configurable BOS behavior."""

from __future__ import annotations

from string import ascii_lowercase

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, UNKNOWN = 0, 1, 2


def build_tokenizer(bos: str | None = "<bos>", adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer for space-separated letters with a vocabulary of 29 tokens.

    Args:
        bos: text of the BOS token, with ID 0; None for no BOS token.
        adds_bos: whether to prepend BOS to each text, as the Llama and Gemma tokenizers do.
    """
    vocabulary = {bos or "<unused>": BOS, "<eos>": EOS, "<unk>": UNKNOWN}
    vocabulary |= {letter: i for i, letter in enumerate(ascii_lowercase, start=3)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos is not None and adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="<eos>", unk_token="<unk>")


def letters(ids: list[int]) -> str:
    """Decode token IDs to text: ``^`` for BOS, ``$`` for EOS, ``?`` for unknown."""
    return "".join({BOS: "^", EOS: "$", UNKNOWN: "?"}.get(i) or ascii_lowercase[i - 3] for i in ids)
