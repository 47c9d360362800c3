"""Writing a pruned model as a plain Hugging Face folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import RoseExpError


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Write safetensors, configuration and tokenizer to ``folder``, whole or not at all.

    The zeros are stored as they are: the folder is no smaller than the dense model's, and loads like any other.

    Raises:
        RoseExpError: ``folder`` exists already, or the disk refuses.
    """
    if folder.exists():
        raise RoseExpError(f"save: {folder} exists already, and is not written over")
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        os.replace(scratch, folder)
    except (OSError, SafetensorError) as error:
        raise RoseExpError(f"save: cannot write the model to {folder}: {error}") from error
    finally:
        if scratch is not None and scratch.exists():
            shutil.rmtree(scratch)
    return folder
