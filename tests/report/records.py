"""Synthetic run records in the format that runs write."""

from __future__ import annotations

import copy
from typing import Any

VERSIONS = {"rose_exp": "0.1.0", "torch": "2.13.0", "transformers": "5.0.0", "python": "3.11.2"}
BASE: dict[str, Any] = {
    "status": "finished",
    "run_id": "",
    "label": "",
    "started": "2026-01-01T12:00:00.000+00:00",
    "ended": "2026-01-01T12:01:00.000+00:00",
    "error": None,
    "metrics": {"sparsity": 0.5},
    "standard_errors": {},
    "seconds": {"texts": 1.0, "pruning": 90.0, "pruning.solving": 4.0, "evaluation": 5.0},
    "peak_memory_bytes": {"host": 10**9, "device": None},
    "protocol": {
        "seed": 0,
        "ranks": 1,
        "versions": VERSIONS,
        "revision": "0123456789abcdef",
        "device": "cpu: x86_64",
        "threads": 2,
        "platform": "Linux",
        "backend": "numba",
        "model": {"name": "Llama-2-7b-hf", "source": "meta-llama/Llama-2-7b-hf", "revision": "abc", "dtype": "float16"},
        "calibration": {
            "source": "allenai/c4",
            "sha256": "c4",
            "cut": "documents",
            "seed": 0,
            "windows": 128,
            "window": 2048,
            "tokens_sha256": "drawn with 0",
        },
        "evaluation": {"wikitext2": {"source": "wikitext", "sha256": "w2", "windows": 166, "window": 2048}},
    },
    "config": {
        "model": {"path": "meta-llama/Llama-2-7b-hf", "embedded": None, "dtype": "auto"},
        "method": {"name": "", "options": {}, "layer_options": {}},
        "sparsity": {"pattern": "unstructured", "ratio": 0.7},
        "reorder": {"columns": "none", "blocks": "none", "threshold": 0.5, "score": "wanda"},
        "calibration": {"dataset": "allenai/c4", "draw": "documents", "samples": 128, "window": 2048},
        "evaluation": {
            "perplexity": {"wikitext2": {"dataset": "Salesforce/wikitext", "window": 2048}},
            "batch": 1,
            "zero_shot": {"tasks": []},
        },
        "engine": {"block_size": 128, "damping": 0.01, "backend": "auto"},
        "refine": {"steps": 0, "mask_iterations": 0},
        "target": {"strength": 0.0, "residual": 0.0},
        "pipeline": {"layers": ["*"], "skip": [], "true_sequential": False, "batch": 4, "activations": "device"},
        "seed": 0,
        "device": "auto",
        "save": False,
        "tracking": {"kind": "none"},
    },
    "layers": [],
}
METHODS = {"Dense": "dense", "SparseGPT": "sparsegpt", "ROSE": "sparsegpt", "Wanda": "wanda", "DSnoT": "dsnot"}


def record(
    label: str,
    perplexity: float,
    seed: int = 0,
    *,
    ratio: float = 0.7,
    pattern: str | None = None,
    reordered: int | None = None,
    **changes,
) -> dict:
    """Return the record of a finished run.

    Args:
        reordered: number of reordered layers out of 168; None for a record without the metric.
        changes: overrides of nested fields, with ``__`` for each dot, e.g. ``config__engine__damping=0.1``.
    """
    made = copy.deepcopy(BASE)
    config, protocol = made["config"], made["protocol"]
    made["label"] = label
    config["method"]["name"] = METHODS[label]
    config["seed"] = protocol["seed"] = protocol["calibration"]["seed"] = seed
    protocol["calibration"]["tokens_sha256"] = f"drawn with {seed}"
    config["sparsity"] = {"pattern": pattern, "ratio": None} if pattern else {"pattern": "unstructured", "ratio": ratio}
    if label == "ROSE":
        config["reorder"] |= {"columns": "descending", "blocks": "descending"}
    if label == "Dense":
        protocol["calibration"] = protocol["backend"] = None
        del made["seconds"]["pruning"]
    made["metrics"]["perplexity.wikitext2"] = perplexity
    made["run_id"] = f"{label} {ratio} {pattern} {seed} {sorted(changes.items())}"
    if reordered is not None:
        made["metrics"]["reordered_layers"] = reordered
        made["layers"] = [{"name": f"layer {i}", "reordered": i < reordered} for i in range(168)]
    for name, value in changes.items():
        *path, last = name.split("__")
        place = made
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return made
