"""Compare this project with llm-compressor: time, peak memory and perplexity for equal work.

    python scripts/compare_peers.py                  # three methods, three seeds
    python scripts/compare_peers.py --rows wanda-0.5 --seeds 0 --json result.json

Both prune the same dense SmolLM2-135M on the CPU with the same calibration tokens, each in a process of its own. The seed
selects the calibration windows. Seconds are those of pruning, without loading and saving. Perplexity of both is measured by
this project, in float32. llm-compressor is installed into an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
PEER = "llmcompressor==0.14.0.1"
ROWS = {  # method and sparsity in both projects
    "sparsegpt-0.7": ("sparsegpt", "0.7"),
    "sparsegpt-2:4": ("sparsegpt", "2:4"),
    "wanda-0.5": ("wanda", "0.5"),
}
WAYS = ("llm-compressor", "rose_exp", "rose_exp bfloat16")


def prepare(folder: Path, seed: int, samples: int, window: int) -> None:
    """Write the dense model in the format of transformers, and the calibration tokens of a seed, (samples, window) int64."""
    from rose_exp.data import draw_windows, load_text
    from rose_exp.models import load_model, load_tokenizer
    from rose_exp.settings.schema import ModelSettings
    from rose_exp.settings.texts import TextSettings

    settings = ModelSettings(embedded="smollm2-135m")
    tokenizer = load_tokenizer(settings)
    if not (folder / "dense").exists():
        load_model(settings).model.save_pretrained(folder / "dense")
        tokenizer.save_pretrained(folder / "dense")
    text = load_text(TextSettings(embedded="c4"), "calibration")
    windows = draw_windows(text, tokenizer, window, samples, seed, "windows", "calibration")
    torch.save(windows.tokens, folder / f"tokens-{seed}.pt")


def peer_python(folder: Path) -> Path:
    """Create the environment of llm-compressor if necessary; return its interpreter."""
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        print(f"installing {PEER}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        torch_version = torch.__version__.partition("+")[0]
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"torch=={torch_version}", PEER], check=True)
        (folder / "installed").touch()
    return python


def run_peer(model: Path, tokens: Path, method: str, sparsity: str, output: Path) -> None:
    """Prune with llm-compressor, in its environment; print the seconds and the peak memory as JSON."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from transformers import AutoModelForCausalLM

    kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
    amount = {"sparsity": 0.5, "mask_structure": "2:4"} if sparsity == "2:4" else {"sparsity": float(sparsity)}
    recipe = kind(**amount, targets=["Linear"], ignore=["re:.*lm_head"])
    windows = torch.load(tokens).tolist()
    rows = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(row) for row in windows]})
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    start = time.perf_counter()
    oneshot(
        model=loaded,
        dataset=rows,
        recipe=recipe,
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
    )
    _finish(time.perf_counter() - start, loaded, output)


def run_ours(model: Path, tokens: Path, method: str, sparsity: str, output: Path, dtype: str) -> None:
    """Prune with this project; print the seconds and the peak memory as JSON."""
    from rose_exp.engine import METHODS, SemiStructured, Unstructured
    from rose_exp.models import load_model
    from rose_exp.pruning import PruneContext, PruningPlan, prune_model
    from rose_exp.settings.schema import ModelSettings

    pattern = SemiStructured(2, 4) if sparsity == "2:4" else Unstructured(float(sparsity))
    loaded = load_model(ModelSettings(path=str(model), dtype=dtype)).model
    windows = torch.load(tokens)
    start = time.perf_counter()
    prune_model(loaded, windows, PruningPlan(METHODS[method](), pattern), PruneContext(device="cpu"))
    _finish(time.perf_counter() - start, loaded, output)


def _finish(seconds: float, model: Any, output: Path) -> None:
    status = Path("/proc/self/status").read_text().splitlines()
    peak = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
    torch.save({name: value.float() for name, value in model.state_dict().items()}, output)
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def measure(way: str, row: str, seed: int, folder: Path, peer: Path, text: Path | None, windows: int) -> dict[str, float]:
    """Prune in a process of its own, and measure the result."""
    output = folder / "pruned.pt"
    command = ["--run", way, row, str(folder / "dense"), str(folder / f"tokens-{seed}.pt"), str(output)]
    interpreter = peer if way == "llm-compressor" else sys.executable
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": "" if way == "llm-compressor" else str(REPOSITORY)}
    done = subprocess.run([interpreter, __file__, *command], env=environment, stdout=subprocess.PIPE, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{way}, {row}: exit status {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found | evaluate(folder, output, text, windows)


def evaluate(folder: Path, weights: Path, text: Path | None, windows: int) -> dict[str, float]:
    """Return the perplexity of pruned weights, in float32, and the fraction of zeros in the layers of the blocks."""
    from rose_exp.data import contiguous_windows, load_text
    from rose_exp.evaluation import perplexity
    from rose_exp.models import all_linear_layers, find_blocks, load_model, load_tokenizer
    from rose_exp.settings.schema import ModelSettings
    from rose_exp.settings.texts import TextSettings

    settings = ModelSettings(path=str(folder / "dense"))
    model = load_model(settings).model
    model.load_state_dict(torch.load(weights))
    source = TextSettings(path=str(text)) if text else TextSettings(embedded="wiki")
    tokens = contiguous_windows(load_text(source, "--text"), load_tokenizer(settings), 1024, windows, "--text").tokens
    layers = [layer.weight for layer in all_linear_layers(find_blocks(model))]
    zeros = sum(int((weight == 0).sum()) for weight in layers) / sum(weight.numel() for weight in layers)
    return {"perplexity": perplexity(model, tokens).value, "sparsity": zeros}


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table of means over seeds, with standard deviations if there are several."""
    lines = ["| | seconds | ratio | peak GB | sparsity | perplexity | seeds |", "|---|---:|---:|---:|---:|---:|---:|"]
    for row in dict.fromkeys(result["row"] for result in results):
        groups = {way: [r for r in results if (r["row"], r["way"]) == (row, way)] for way in WAYS}
        reference = groups["llm-compressor"] and statistics.mean(r["seconds"] for r in groups["llm-compressor"])
        for way, found in groups.items():
            if found:
                seconds = statistics.mean(r["seconds"] for r in found)
                cells = [
                    _mean(found, "seconds", 1),
                    f"{reference / seconds:.2f}" if reference else "",
                    _mean(found, "peak_bytes", 2, 1e-9),
                    _mean(found, "sparsity", 4),
                    _mean(found, "perplexity", 2),
                    str(len(found)),
                ]
                lines.append(f"| {row}, {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(found: list[dict[str, Any]], name: str, digits: int, scale: float = 1.0) -> str:
    values = [scale * result[name] for result in found]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        way, row, model, tokens, output = sys.argv[2:]
        arguments = (Path(model), Path(tokens), *ROWS[row], Path(output))
        if way == "llm-compressor":
            run_peer(*arguments)
        else:
            run_ours(*arguments, dtype="bfloat16" if "bfloat16" in way else "float32")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="default: all")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 1024 tokens (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of 1024 tokens (default: %(default)s)")
    parser.add_argument("--text", type=Path, help="text to evaluate on (default: an embedded one from Wikipedia)")
    parser.add_argument("--environment", type=Path, help="folder of llm-compressor's environment (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="output file for the results")
    options = parser.parse_args()

    from rose_exp.runtime.files import write_text

    results = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        peer = peer_python(options.environment or folder / "environment") if "llm-compressor" in options.ways else Path()
        for seed in options.seeds:
            prepare(folder, seed, options.samples, 1024)
            for row in options.rows:
                for way in options.ways:
                    found = {"row": row, "way": way, "seed": seed} | measure(
                        way, row, seed, folder, peer, options.text, options.windows
                    )
                    results.append(found)
                    print(json.dumps(found), file=sys.stderr, flush=True)
    print(table(results))
    if options.json:
        facts = {"peer": PEER, "torch": torch.__version__, "threads": torch.get_num_threads(), "processor": _processor()}
        write_text(options.json, json.dumps(facts | {"results": results}, indent=1) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
