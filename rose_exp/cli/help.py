"""The text of ``rose-exp --help``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.plugins import declared
from .paths import SEARCH_PATH, config_folder

if TYPE_CHECKING:
    import argparse

GROUPS = {  # the groups of conf/ in the order of a run, with their descriptions for --help
    "model": "the model to prune",
    "method": "the pruning method",
    "reorder": "the order in which SparseGPT prunes columns and blocks",
    "sparsity": "the sparsity and its pattern",
    "calibration": "the calibration data",
    "evaluation": "the metrics of the pruned model; [a,b] selects several",
    "engine": "numerical options of the layer solver",
    "refine": "post-pruning refinement",
    "allocation": "sparsity allocation across layers",
    "target": "the layers' regression target",
    "reconstruction": "training of each pruned block",
    "tracking": "experiment trackers, in addition to the run record; [a,b] selects several",
    "experiment": "a complete study: choices of the groups above and the axes of its sweep",
    "debug": "a tiny version of any run, as a smoke test",
    "hydra/launcher": "where the jobs of a sweep run (default: one after the other in this process)",
    "hydra/sweeper": "how a sweep chooses its jobs (default: every combination)",
}
PLUGINS = {  # entry point groups whose names are choices
    "method": "rose_exp.methods",
    "calibration": "rose_exp.datasets",
    "evaluation": "rose_exp.datasets",
    "tracking": "rose_exp.trackers",
}
USAGE = """rose-exp: one-shot pruning of large language and diffusion models

  rose-exp SETTING=VALUE …                    start one run in outputs/RUN_ID; RUN_ID is a hash of the settings
  rose-exp -m SETTING=A,B … experiment=NAME   sweep over all combinations; finished runs are reused
  rose-exp … plan=true                        list the jobs with estimated time and memory, without running them
  rose-exp … --cfg job                        print the composed configuration, without running it
  rose-exp-report DIR …                       generate tables and figures from finished runs
  rose-exp-runs list                          list runs; show, compare and copy act on single runs
  rose-exp-clean DIR …                        remove what killed runs left behind
  eval "$(rose-exp -sc install=bash)"         enable tab completion (bash, zsh, fish)

Set a whole group with GROUP=CHOICE, and a single setting with GROUP.NAME=VALUE. Groups and their choices:
"""


def help_text(parsed: argparse.Namespace | None = None) -> str:
    """Return the usage, every group with its choices, and the ungrouped settings.

    The first sentence of a choice's file describes it.

    Args:
        parsed: the parsed command line, whose search path can contain further configuration files.
    """
    lines, folders = [USAGE], [*_folders(parsed), config_folder()]
    for group, description in GROUPS.items():
        files = {path.stem: path for folder in reversed(folders) for path in (folder / group).glob("*.yaml")}
        choices = [path for name, path in sorted(files.items()) if not name.startswith("_")]
        installed = declared(PLUGINS[group]) if group in PLUGINS else {}
        width = max(map(len, [*files, *installed]))
        lines.append(f"{group}: {description}")
        lines += [f"  {path.stem.ljust(width)}  {_first_sentence(path)}" for path in choices]
        lines += [f"  {name.ljust(width)}  of {source}" for name, source in installed.items()]
        lines.append("")
    lines += ["Ungrouped settings with their defaults (--hydra-help lists Hydra's own options):", *_single_settings()]
    return "\n".join(lines)


def _folders(parsed: argparse.Namespace | None) -> list[Path]:
    """Return the local folders that ``--config-dir`` and ``hydra.searchpath`` name."""
    if parsed is None:
        return []
    texts = [text.partition("=")[2] for text in parsed.overrides if text.lstrip("+").startswith(SEARCH_PATH)]
    named = [Path(place.replace("\\'", "'")) for text in texts for place in re.findall(r"file://((?:\\.|[^'\",\]])+)", text)]
    return ([Path(parsed.config_dir)] if parsed.config_dir else []) + named


def _first_sentence(path: Path) -> str:
    comments = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comments.append(line.removeprefix("#").strip())
    text = " ".join(comments).partition(" reproduces:")[0].strip()
    return re.split(r"(?<=[^.A-Z][.;]) (?=[A-Z(])|: (?=rose-exp)", text)[0].rstrip(";")


def _single_settings() -> list[str]:
    text = (config_folder() / "config.yaml").read_text(encoding="utf-8").partition("\nhydra:")[0]
    return [f"  {line}" for line in ("pipeline:" + text.partition("\npipeline:")[2]).splitlines() if line]
