"""Where the ``rose-exp`` command starts. What only shows something is answered here, without libraries that take seconds."""

from __future__ import annotations

import re
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from .paths import config_folder

GROUPS = {  # of conf/, in the order of a run, and what each decides
    "model": "the model to prune",
    "method": "how weights are chosen and the others updated",
    "reorder": "in which order SparseGPT prunes columns and blocks",
    "sparsity": "how many weights go, and in what pattern",
    "calibration": "the text whose activations tell which weights matter",
    "evaluation": "what is measured afterwards; several with [a,b]",
    "engine": "how a layer is solved",
    "refine": "what is made better of a layer once it is pruned",
    "allocation": "how layers share what is pruned",
    "target": "what a layer is asked to be",
    "tracking": "where a run is told as it goes, beside its record",
    "experiment": "a study as a whole: any of the above, and the axes of its sweep",
    "debug": "a run made tiny, to see that it works",
    "hydra/launcher": "where the jobs of a sweep run; one after the other without it",
    "hydra/sweeper": "how a sweep chooses its jobs; every combination without it",
}
USAGE = """rose-exp: one-shot pruning of large language models, one run or a sweep

  rose-exp SETTING=VALUE …                    one run, in outputs/RUN, where RUN is made of all settings that count
  rose-exp -m SETTING=A,B … experiment=NAME   a sweep over every combination; what is finished is reused
  rose-exp … plan=true                        list the jobs, their time and memory, and run none
  rose-exp … --cfg job                        every setting, as it would be
  rose-exp-report DIR …                       tables and figures of finished runs
  eval "$(rose-exp -sc install=bash)"         completion with the tab key; also zsh and fish

Settings are chosen by group (GROUP=CHOICE) or one by one (GROUP.NAME=VALUE):
"""


def main() -> None:
    """``rose-exp``."""
    parsed = get_args_parser().parse_args()
    if parsed.help:
        print(help_text())
    elif parsed.shell_completion:
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(_nothing)()
    else:
        from .app import main as run  # slow to import

        run()


def _nothing(_: DictConfig) -> None:
    """What is run where nothing is."""


def help_text() -> str:
    """Every group with its choices, each explained by the first sentence of its file; then the settings of no group."""
    lines = [USAGE]
    for group, what in GROUPS.items():
        choices = sorted(p for p in (config_folder() / group).glob("*.yaml") if not p.stem.startswith("_"))
        width = max(len(path.stem) for path in choices)
        lines.append(f"{group}: {what}")
        lines += [f"  {path.stem.ljust(width)}  {_first_sentence(path)}" for path in choices]
        lines.append("")
    lines += ["settings of no group, and those of Hydra are told by --cfg job and --hydra-help:", *_single_settings()]
    return "\n".join(lines)


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
