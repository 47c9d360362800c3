"""Small runs reproduce their frozen results exactly; see :mod:`tests.runs.frozen`."""

from __future__ import annotations

from typing import Any

import pytest

from . import frozen

EQUAL_WEIGHTS = [  # configurations that differ only in what they measure
    ["wanda", "by_blocks", "zero_shot"],
    ["sparsegpt", "study"],
    ["dense", "zero_shot dense"],
]
SHOWN = 20  # differences shown in a failure


@pytest.fixture(scope="module", params=sorted(frozen.FOLDER.glob("*.json")), ids=lambda file: file.stem)
def results(request) -> dict[str, Any]:
    """Frozen results of each environment."""
    return frozen.read(request.param)["results"]


@pytest.fixture(scope="module")
def own_results(shared) -> dict[str, Any]:
    """Frozen results of the current environment."""
    assert frozen.DATA.parent == shared
    file = frozen.file_of(frozen.environment())
    if not file.exists():
        pytest.skip(f"no frozen results for this processor: {file.name} does not exist")
    found = frozen.read(file)
    changes = frozen.differences(found["environment"], frozen.environment())
    if changes:
        pytest.skip(f"{file.name} was written in another environment: {'; '.join(changes)}")
    return found["results"]


@pytest.mark.slow
@pytest.mark.parametrize("name", frozen.NAMES)
def test_run_reproduces_its_frozen_result(name, own_results, tmp_path):
    changes = frozen.deviations(own_results, name, frozen.result_of(name, tmp_path))
    assert not changes, "\n".join([f"{len(changes)} values changed:", *changes[:SHOWN]])


def test_every_configuration_has_a_frozen_result(results):
    assert set(results) == set(frozen.NAMES) - set(frozen.SAME)
    assert {of for of, _, _ in frozen.SAME.values()} <= set(results)


def test_only_the_listed_configurations_have_equal_weights(results):
    single = {name: result for name, result in results.items() if name not in frozen.RANKS}  # ranks may round differently
    assert sorted(frozen.equal_weights(single)) == sorted(EQUAL_WEIGHTS)


def test_options_of_the_configurations_take_effect(results):
    """Freezing a configuration is useless if its option has no effect."""
    fields = {name: result.get("layers", {}) for name, result in results.items()}
    acts = {
        "reordered": ["rose", "rose 4:8", "rose_plus", "flux", "gpt2", "opt", "experts magnitude", "ranks rose_plus"],
        "rank": ["oats"],
        "dead_columns": ["opt"],
        "fallback": ["experts", "experts magnitude"],
        "target": ["target half", "target outputs", "rose_plus", "gpt2"],
        "mask_changes": ["refine masks", "rose_plus", "sd3 refine"],
        "refinement_rejected": ["refine masks"],
        "permuted": ["permute", "rose_plus 2:4"],
        "removed": ["structured", "gemma2 structured", "sd3 structured", "ddpm heads"],
    }
    neutral = {"target": "dense", "fallback": None}
    for field, names in acts.items():
        assert [name for name in names if fields[name][field] in (neutral.get(field, 0),)] == []
    assert fields["damping raised"]["damping"] != 0
    assert results["study"]["studies"]


def test_differences_are_reported_by_name():
    assert frozen.differences({"a": {"b": 0.1, "c": float("nan")}}, {"a": {"b": 0.2, "c": float("nan")}}) == [
        "a: b: expected 0.1, got 0.2"
    ]
    assert frozen.differences({"a": 1}, {}) == ["a: expected 1, got null"]
