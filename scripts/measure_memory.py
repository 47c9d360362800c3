"""Compare the estimates of memory and disk usage with the peaks of real runs.

    python scripts/measure_memory.py                 # all cases, prints the table in scripts/measure_memory.md
    python scripts/measure_memory.py wanda oats      # the cases whose names contain one of these words

Every case is a run of a model with random weights, in a process of its own. Its peak memory is the high-water mark of the
resident memory (VmHWM) during the run. Its peak on disk is the largest size of the run's folder, read every 5 ms.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORDS = 500  # of the tokenizer and the texts


@dataclass(frozen=True)
class Case:
    """A run to measure: the sizes of the model, and the overrides of the settings."""

    model: Mapping[str, Any]
    overrides: Sequence[str] = ()


SMALL = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 12, "vocab_size": 1000}
WIDE = SMALL | {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 1}
DEEP = SMALL | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16, "num_attention_heads": 8}
LARGE_VOCABULARY = SMALL | {"vocab_size": 150_000}
HALF = {"dtype": "bfloat16"}
SPARSEGPT = ["method=sparsegpt"]
STRUCTURED = ["sparsity=structured", "sparsity.ratio=0.3"]

CASES: dict[str, Case] = {
    "magnitude": Case(WIDE, ["method=magnitude"]),
    "wanda": Case(WIDE, ["method=wanda"]),
    "dsnot": Case(WIDE, ["method=dsnot"]),
    "dsnot 2:4": Case(WIDE, ["method=dsnot", "sparsity=2:4"]),
    "dsnot_sparsegpt": Case(WIDE, ["method=dsnot_sparsegpt"]),
    "sparsegpt": Case(WIDE, SPARSEGPT),
    "sparsegpt 2:4": Case(WIDE, [*SPARSEGPT, "sparsity=2:4"]),
    "sparsegpt bfloat16": Case(WIDE | HALF, SPARSEGPT),
    "rose": Case(WIDE, ["method=rose", "reorder.threshold=0"]),
    "oats": Case(SMALL, ["method=oats", "method.options.iterations=2"]),
    "oats bfloat16": Case(WIDE | HALF, ["method=oats", "method.options.iterations=1"]),
    "alps": Case(SMALL, ["method=alps", "method.options.max_iterations=6"]),
    "refine cg": Case(WIDE, [*SPARSEGPT, "refine=cg"]),
    "refine admm": Case(WIDE, [*SPARSEGPT, "refine=admm", "refine.mask_iterations=4"]),
    "wanda refine admm": Case(SMALL, ["method=wanda", "refine=admm", "refine.mask_iterations=4"]),
    "target asymmetric": Case(WIDE, [*SPARSEGPT, "target=asymmetric"]),
    "target residual": Case(WIDE, [*SPARSEGPT, "target=residual"]),
    "rose_plus": Case(WIDE, ["method=rose_plus", "refine.mask_iterations=4"]),
    "rose_plus bfloat16": Case(WIDE | HALF, ["method=rose_plus", "refine.mask_iterations=4"]),
    "allocation owl": Case(SMALL, [*SPARSEGPT, "allocation=owl", "calibration.samples=32"]),
    "allocation losses": Case(WIDE, [*SPARSEGPT, "allocation=losses"]),
    "reconstruction": Case(WIDE, ["method=wanda", "reconstruction=separate", "reconstruction.epochs=2"]),
    "reconstruction bfloat16": Case(  # few windows: slow on processors without instructions for bfloat16
        WIDE | HALF, ["method=wanda", "reconstruction=together", "reconstruction.epochs=1", "calibration.samples=2"]
    ),
    "permute": Case(WIDE, ["method=wanda", "sparsity=2:4", "pipeline.permute=true"]),
    "true_sequential": Case(WIDE, [*SPARSEGPT, "pipeline.true_sequential=true"]),
    "structured sparsegpt": Case(WIDE, [*SPARSEGPT, *STRUCTURED]),
    "structured exact": Case(WIDE, [*SPARSEGPT, *STRUCTURED, "sparsity.saliency=exact"]),
    "structured wanda": Case(WIDE, ["method=wanda", *STRUCTURED]),
    "structured magnitude": Case(WIDE, ["method=magnitude", *STRUCTURED]),
    "structured saved": Case(WIDE, ["method=wanda", "sparsity=structured", "sparsity.ratio=0.5", "save=true"]),
    "vocabulary": Case(LARGE_VOCABULARY, ["method=wanda"]),
    "vocabulary bfloat16": Case(LARGE_VOCABULARY | HALF, ["method=wanda", "evaluation.perplexity.local.window=1024"]),
    "vocabulary batch 32": Case(LARGE_VOCABULARY, ["method=wanda", "evaluation.batch=32", "pipeline.batch=32"]),
    "vocabulary, divergence": Case(LARGE_VOCABULARY, ["method=wanda", "evaluation.divergence=true"]),
    "evaluation only": Case(LARGE_VOCABULARY, ["method=dense"]),
    "evaluation only, small": Case(DEEP, ["method=dense"]),
    "deep": Case(DEEP, SPARSEGPT),
    "deep, few layers": Case(DEEP, [*SPARSEGPT, "pipeline.layers=['*.layers.0.*']"]),
    "deep, one layer of each block": Case(DEEP, [*SPARSEGPT, "pipeline.layers=['*.q_proj']"]),
    "deep, from disk": Case(DEEP, [*SPARSEGPT, "pipeline.weights=disk"]),
    "deep, saved": Case(DEEP, ["method=wanda", "save=true"]),
    "deep, saved, from disk": Case(DEEP, ["method=wanda", "save=true", "pipeline.weights=disk"]),
    "deep, no state": Case(DEEP, [*SPARSEGPT, "pipeline.resume=none"]),
    "deep, recompute": Case(DEEP, [*SPARSEGPT, "pipeline.resume=recompute"]),
    "by blocks": Case(DEEP, ["method=wanda", "pipeline.by_blocks=true"]),
    "samples": Case(SMALL, ["method=wanda", "calibration.samples=48"]),
    "samples, host": Case(SMALL, ["method=wanda", "calibration.samples=48", "pipeline.activations=host"]),
    "samples, disk": Case(SMALL, ["method=wanda", "calibration.samples=48", "pipeline.activations=disk"]),
    "samples, target": Case(SMALL, ["method=wanda", "calibration.samples=32", "target=residual"]),
    "samples, target, disk": Case(
        SMALL, ["method=wanda", "calibration.samples=32", "target=residual", "pipeline.activations=disk"]
    ),
    "samples, reconstruction": Case(
        SMALL, ["method=wanda", "calibration.samples=32", "reconstruction=separate", "reconstruction.epochs=2"]
    ),
    "window": Case(SMALL, ["method=wanda", "calibration.window=2048", "evaluation.perplexity.local.window=2048"]),
    "weights, by blocks and activations on disk": Case(
        DEEP, ["method=wanda", "pipeline.weights=disk", "pipeline.activations=disk", "calibration.samples=32"]
    ),
}


def write_model(sizes: Mapping[str, Any], folder: Path) -> None:
    """Write a Llama with random weights and a tokenizer of single words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=4096, **{"dtype": "float32"} | dict(sizes)))
    model.to(getattr(torch, dict(sizes).get("dtype", "float32"))).save_pretrained(folder, max_shard_size="500MB")
    words = {f"w{number}": number for number in range(WORDS)} | {"<unk>": WORDS}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def write_text(path: Path, words: int = 60_000) -> None:
    import random

    draw = random.Random(0)
    path.write_text(" ".join(f"w{draw.randrange(WORDS)}" for _ in range(words)), encoding="utf-8")


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Run a case in a process of its own, and return its estimates and peaks in bytes, and its seconds by stage."""
    write_model(case.model, folder / "llama")
    text = folder / "text.txt"
    write_text(text)
    overrides = ["model=local", f"model.path={folder / 'llama'}", "calibration=local", f"calibration.path={text}"]
    overrides += ["calibration.samples=4", "calibration.window=512", "evaluation=local", "device=cpu"]
    overrides += [f"evaluation.perplexity.local.path={text}", "evaluation.perplexity.local.window=512"]
    overrides += ["evaluation.perplexity.local.windows=2", "figures.draw=true", *case.overrides]
    run = f"from scripts.measure_memory import run_in_stages; run_in_stages({overrides!r}, {str(folder / 'out')!r})"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    watcher = _Watcher(folder / "out")
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, env=environment)
    disk = watcher.stop()
    if done.returncode:
        raise RuntimeError(f"{' '.join(case.overrides)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"peak_disk": disk}


def run_in_stages(overrides: Sequence[str], folder: str) -> None:
    """Run, and print the estimates, the peak and the stage of the peak as JSON."""
    import rose_exp
    from rose_exp.tracking import record

    peaks: dict[str, int] = {}
    stage = record.Stopwatch.stage

    @contextmanager
    def measured(self: record.Stopwatch, name: str) -> Iterator[None]:
        _mark(peaks, "before " + name)
        with stage(self, name):
            yield
        _mark(peaks, name)

    record.Stopwatch.stage = measured
    result = rose_exp.run(list(overrides), folder)
    _mark(peaks, "end")
    estimate, where = result["estimate"], max(peaks, key=peaks.get)
    found = {"estimate": estimate["host"], "disk": estimate["disk"], "peak": peaks[where], "stage": where, "peaks": peaks}
    print(json.dumps(found | {"seconds": result["seconds"], "weights": estimate["weights"]}))


def _mark(peaks: dict[str, int], name: str) -> None:
    """Keep the high-water mark since the last call under a name, and start a new one."""
    status = Path("/proc/self/status").read_text().splitlines()
    peaks[name] = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
    Path("/proc/self/clear_refs").write_text("5")


class _Watcher:
    """Reads the size of a folder again and again in a thread, and keeps the largest."""

    def __init__(self, folder: Path):
        self.folder, self.peak = folder, 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self) -> None:
        while not self.stopped.wait(0.005):
            self.peak = max(self.peak, _size(str(self.folder)))

    def stop(self) -> int:
        self.stopped.set()
        self.thread.join()
        return self.peak


def _size(folder: str) -> int:
    total = 0
    try:
        for entry in os.scandir(folder):
            total += _size(entry.path) if entry.is_dir(follow_symlinks=False) else entry.stat().st_blocks * 512
    except FileNotFoundError:  # removed meanwhile
        return total
    return total


HEADER = """| case | memory, estimate | peak | ratio | stage of the peak | disk, estimate | peak | ratio |
|---|---:|---:|---:|---|---:|---:|---:|"""


def table_row(measured: Mapping[str, Any]) -> str:
    """Return a row of the table. The sizes are in MB."""
    memory, disk = (measured["estimate"], measured["peak"]), (measured["disk"], measured["peak_disk"])
    cells = [
        f"{estimate / 1e6:.0f} | {peak / 1e6:.0f} | {estimate / max(peak, 1):.2f}" if peak > 2e6 else " | | "
        for estimate, peak in (memory, disk)
    ]
    return f"| {measured['name']} | {cells[0]} | {measured['stage']} | {cells[1]} |"


def main() -> None:
    wanted = sys.argv[1:]
    print(HEADER, flush=True)
    for name in CASES:
        if wanted and not any(word in name for word in wanted):
            continue
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(CASES[name], Path(folder)) | {"name": name}
        print(table_row(measured), flush=True)
        stages = " ".join(f"{stage}={peak / 1e6:.0f}" for stage, peak in measured["peaks"].items())
        print(f"{name}: {stages}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
