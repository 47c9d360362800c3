"""README and documentation: commands are validated, those that work offline run with small settings, and links exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rose_exp.cli.command import check_command
from rose_exp.cli.runs import _parser as runs_parser

from .conftest import REPOSITORY

PAGES = {path.relative_to(REPOSITORY): path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").glob("*.md"))}
for name in ("README.md", "CONTRIBUTING.md"):
    PAGES[Path(name)] = (REPOSITORY / name).read_text(encoding="utf-8")
BLOCKS = [
    block
    for page, text in PAGES.items()
    if page.name not in ("CONTRIBUTING.md", "extending.md")  # their commands need the files that they describe
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
]
COMMANDS = [
    line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")
]
PRUNING = [command for command in dict.fromkeys(COMMANDS) if command.startswith("rose-exp ")]
OTHERS = [command for command in dict.fromkeys(COMMANDS) if not command.startswith("rose-exp ")]
SMALL_IMAGES = ["calibration.samples=2", "evaluation.images.samples=2", "diffusion.steps=2"]
SMALL = [
    "calibration.samples=2",
    "calibration.window=64",
    "evaluation.perplexity.embedded.windows=2",
    "pipeline.layers=['*.0.*']",
]


def test_readme_contains_the_two_scripts():
    readme = PAGES[Path("README.md")]
    assert re.findall(r"^bash (scripts/\w+\.sh) ", readme, re.MULTILINE)[:2] == ["scripts/demo.sh", "scripts/test.sh"]
    assert len(PRUNING) > 14


@pytest.mark.parametrize("command", OTHERS)
def test_other_commands_name_existing_programs(command):
    words = shlex.split(command, comments=True)
    if words[0] in ("bash", "python"):
        assert (REPOSITORY / words[1]).is_file()
    elif words[0] == "torchrun":
        check_command(words[words.index("rose_exp") + 1 :])
    elif words[0] == "rose-exp-runs":
        runs_parser().parse_args(words[1:])
    else:
        assert words[0] in ("rose-exp-report", "rose-exp-clean", "lm_eval")


LINKS = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda value: str(value))
def test_links_lead_to_existing_pages_and_headings(page, link):
    path, _, anchor = link.partition("#")
    target = (REPOSITORY / page).parent / path if path else REPOSITORY / page
    assert target.exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_every_page_is_linked_from_the_readme():
    linked = {link.partition("#")[0] for page, link in LINKS if page == Path("README.md")}
    assert {str(page) for page in PAGES if page.parent == Path("docs")} <= linked


def test_readme_is_short():
    """Details belong to the pages in docs/."""
    assert len(re.sub(r"```.*?```", "", PAGES[Path("README.md")], flags=re.DOTALL).split()) < 1300


@pytest.mark.parametrize("command", PRUNING)
def test_every_command_is_valid(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FILE").write_text("text")
    check_command(shlex.split(command)[1:])


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in PRUNING if not re.search("llama|local|sd3-medium| -m ", c)])
def test_offline_commands_run(command, tmp_path):
    images = "model=small-" in command or "model=digits" in command
    arguments = [*shlex.split(command)[1:], *(SMALL_IMAGES if images else SMALL)]
    done = subprocess.run(
        [sys.executable, "-m", "rose_exp", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ("images.psnr" if images else "perplexity.embedded") in done.stdout


@pytest.mark.parametrize(
    "script", ["demo.sh", "demo_diffusion.sh", "test.sh", "reproduce.sh", "gpu_check.sh", "slurm_node.sh", "_venv.sh"]
)
def test_scripts_parse_and_are_executable(script):
    path = REPOSITORY / "scripts" / script
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert script.startswith("_") or os.access(path, os.X_OK)


def test_documentation_mentions_every_config_choice():
    for path in (REPOSITORY / "conf").glob("*/*.yaml"):
        if path.parent.name not in ("engine", "experiment") and not path.stem.startswith("_"):
            assert any(f"`{path.stem}`" in text for text in PAGES.values()), path
