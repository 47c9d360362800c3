"""Every denoiser class of diffusers is pruned like a reference, or rejected for a documented reason."""

from __future__ import annotations

import re

import pytest

from . import support, survey

PARTICULAR = {  # what only they have
    "CogView4Transformer2DModel": "FFNs that image and text share",
    "DiTTransformer2DModel": "a modulation that is called twice",
    "Flux2Transformer2DModel": "one layer for attention and FFN",
    "HiDreamImageTransformer2DModel": "experts in a part without gradients",
    "JoyImageEditTransformer3DModel": "one layer for queries, keys and values",
    "Kandinsky5Transformer3DModel": "other names of projections",
    "NucleusMoEImageTransformer2DModel": "experts in one tensor",
    "SD3Transformer2DModel": "dual attention",
    "UNet2DConditionModel": "convolutions around transformer blocks",
}


def documented() -> dict[str, str]:
    """Rows of supported classes, and reasons for the others, from the page in the documentation."""
    supported, _, others = support.PAGE.read_text(encoding="utf-8").partition("## Not supported")
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in supported.splitlines() if re.match(r"\| \w+ \| \d", line)}
    return rows | dict(re.findall(r"^\| (\w+) \| (.+) \|$", others, re.MULTILINE))


def check_class(name: str) -> None:
    found = support.examine(name)
    row = support.row(name, found) if found.rejected is None else found.rejected
    assert row == documented()[name], f"run `python -m tests.diffusion.support --write` if this is intended: {found}"


@pytest.mark.parametrize("name", PARTICULAR)
def test_particular_classes_are_pruned_as_documented(name):
    check_class(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in survey.classes() if name not in {*PARTICULAR, *support.NOT_EXAMINED}])
def test_every_class_is_pruned_as_documented(name):
    check_class(name)


def test_page_lists_every_class():
    assert documented().keys() - {"Class"} == set(survey.classes())
