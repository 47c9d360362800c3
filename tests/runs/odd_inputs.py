"""Small inputs of every kind, mutations that damage them, and the command that reads them in this process."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import shutil
import string
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from rose_exp.cli import app
from rose_exp.diffusion.small import small_pipeline

from ..data.small_tokenizers import build_tokenizer
from ..models import gguf

TEXT = " ".join(random.Random(0).choices(string.ascii_lowercase, k=600))
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Outcome:
    """What a command left behind.

    Attributes:
        status: its exit status.
        lines: its error lines.
        output: everything that it printed or logged.
        files: names of files and folders in the folder of the run.
    """

    status: int
    lines: list[str]
    output: str
    files: set[str]


def write_inputs(folder: Path) -> None:
    """Write one small input of every kind."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, max_position_embeddings=64)
    model, tokenizer = transformers.LlamaForCausalLM(config), build_tokenizer()
    for name, options in (("whole", {}), ("sharded", {"max_shard_size": "8KB"})):
        model.save_pretrained(folder / name, **options)
        tokenizer.save_pretrained(folder / name)
    shutil.copytree(folder / "whole", folder / "torch")
    (folder / "torch/model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "torch/pytorch_model.bin")
    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf/model.gguf", model)
    texts = folder / "texts"
    texts.mkdir()
    (texts / "text.txt").write_text(TEXT, encoding="utf-8")
    rows = [json.dumps({"id": i, "text": TEXT[i : i + 200]}) for i in range(0, 40, 2)]
    (texts / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (texts / "rows.json").write_text(f"[{', '.join(rows)}]", encoding="utf-8")
    (texts / "prompts.txt").write_text("a cat\na dog\na hen\n", encoding="utf-8")
    (texts / "prompts.tsv").write_text("text\tid\na cat\t1\na dog\t2\na hen\t3\n", encoding="utf-8")
    (texts / "prompts.jsonl").write_text(
        "".join(json.dumps({"text": f"a {x}"}) + "\n" for x in ("cat", "dog")), encoding="utf-8"
    )
    (folder / "questions").mkdir()
    questions = [{"goal": f"a b {x}", "sol1": "c d", "sol2": "e f", "label": i % 2} for i, x in enumerate("ghij")]
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (folder / "questions/piqa_validation.jsonl").write_text(lines, encoding="utf-8")
    small_pipeline("sd").save_pretrained(folder / "pipeline")


def write_gguf(path: Path, model: torch.nn.Module) -> None:
    """Write a Llama model with its tokenizer as a GGUF file."""
    writer = gguf.start(path, model.config, model.config.num_hidden_layers)
    tokens = ["<unk>", "<s>", "</s>", "▁", *string.ascii_lowercase, "y2", "z2"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types([2, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, value in model.state_dict().items():
        writer.add_tensor(gguf.name_of(name), value.numpy())
    gguf.finish(writer)


LANGUAGE = [
    *("model=local", "method=magnitude", "calibration=local", "calibration.samples=2", "calibration.window=16"),
    *("evaluation.perplexity.local.window=16", "evaluation.perplexity.local.windows=2", "figures.draw=false", "save=true"),
]
DIFFUSION = [
    *("model=diffusion-local", "method=magnitude", "calibration.samples=1", "evaluation=none", "save=true"),
    *("diffusion.steps=2", "diffusion.height=32", "diffusion.width=32", "figures.draw=false", "diffusion.packages=1"),
]


def language(folder: Path, model: str = "whole", calibration: str = "rows.jsonl", evaluation: str = "text.txt") -> list[str]:
    """Return the overrides of a run of a language model on the inputs in ``folder``."""
    texts = folder / "texts"
    return [
        *LANGUAGE,
        f"model.path={folder / model}",
        f"calibration.path={texts / calibration}",
        "evaluation=local",
        f"evaluation.perplexity.local.path={texts / evaluation}",
    ]


def zero_shot(folder: Path) -> list[str]:
    """Return the overrides of a run that measures accuracy on the questions in ``folder``."""
    own = [override for override in language(folder) if "perplexity" not in override and not override.startswith("evaluation=")]
    data = f"evaluation.zero_shot.data_dir={folder / 'questions'}"
    return [*own, "evaluation=zero_shot", "evaluation.zero_shot.tasks=[piqa]", data]


def diffusion(folder: Path, prompts: str = "prompts.txt") -> list[str]:
    """Return the overrides of a run of a diffusion model on the inputs in ``folder``."""
    path = folder / "texts" / prompts
    return [*DIFFUSION, f"model.path={folder / 'pipeline'}", "calibration.embedded=null", f"calibration.path={path}"]


def execute(overrides: list[str], folder: Path) -> Outcome:
    """Run the command in this process, with ``folder`` as the folder of the run."""
    printed = io.StringIO()
    before = sys.argv, Path.cwd(), list(logging.getLogger().handlers)
    sys.argv = ["rose-exp", *overrides, f"hydra.run.dir={folder}", "device=cpu"]
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    status: object = 0
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            app.main()
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
        logging.getLogger().handlers[:] = before[2]
    output = printed.getvalue()
    lines = [line for line in output.splitlines() if " ERROR " in line or line.startswith("  * ")]
    files = (
        {str(path.relative_to(folder)) for path in folder.rglob("*") if ".hydra" not in path.parts}
        if folder.exists()
        else set()
    )
    return Outcome(status, lines, output, files)
