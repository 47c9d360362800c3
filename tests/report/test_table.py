"""Plain-text table of results."""

from __future__ import annotations

from rose_exp.report import format_table

from .records import record


def rows(records) -> list[list[str]]:
    return [line.split() for line in format_table(records).splitlines()]


def test_model_column_is_omitted_for_a_single_model():
    found = rows([record("SparseGPT", 27.68), record("ROSE", 26.38)])
    assert found[0] == ["method", "pattern", "sparsity", "perplexity.wikitext2", "seconds"]
    assert found[2] == ["SparseGPT", "unstructured", "0.5000", "27.68", "96"]


def test_model_column_is_shown_for_several_models():
    other = record("SparseGPT", 9.0, config__model__path="another/model", protocol__model__name="model")
    failed = record("ROSE", 9.0, config__model__path="third/model") | {"status": "failed"}
    del failed["protocol"]["model"]
    found = rows([record("SparseGPT", 27.68), other, failed])
    assert found[0][:2] == ["model", "method"]
    assert [line[0] for line in found[2:]] == ["Llama-2-7b-hf", "model", "-"]
    assert found[4][1:] == ["ROSE", "unstructured", "failed"]


def test_settings_column_distinguishes_rows_with_equal_names():
    runs = [record("ROSE", 26.0 + seed, config__seed=seed) for seed in (0, 1)]
    found = rows([record("SparseGPT", 27.68), *runs])
    assert found[0] == ["method", "pattern", "settings", "sparsity", "perplexity.wikitext2", "seconds"]
    assert [line[2] for line in found[3:]] == ["seed=0", "seed=1"]
    assert found[2][:3] == ["SparseGPT", "unstructured", "0.5000"]  # the only one of its name

    runs = [
        record("ROSE", 26.0, seed, config__calibration__samples=8 + seed, config__calibration__seed=seed) for seed in (0, 1)
    ]
    assert "samples=9 calibration.seed=1 seed=1" in format_table(runs)  # the full names of two settings called seed


def test_settings_without_an_effect_do_not_distinguish_rows():
    runs = [record("ROSE", 26.0, config__tags=[tag], config__sparsity__ratio=ratio) for tag, ratio in (("a", 0.5), ("b", 0.6))]
    assert rows(runs)[0] == ["method", "pattern", "sparsity", "perplexity.wikitext2", "seconds"]


def test_image_metrics_keep_significant_digits():
    run = record("SparseGPT", 27.68)
    run["metrics"]["images.latent_mse"] = 0.00123456
    assert rows([run])[2][-2] == "0.001235"


def test_reordered_column_counts_reordered_layers():
    dense, failed = record("Dense", 5.47), record("ROSE", 9.0, reordered=4) | {"status": "failed", "metrics": {}}
    text = format_table([dense, record("SparseGPT", 27.68), record("ROSE", 26.38, reordered=4), failed])
    found = [line.split() for line in text.splitlines()]
    assert found[0] == ["method", "pattern", "sparsity", "reordered", "perplexity.wikitext2", "seconds"]
    assert found[2] == ["Dense", "-", "0.5000", "5.47", "6"]
    assert found[3] == ["SparseGPT", "unstructured", "0.5000", "27.68", "96"]
    assert found[4] == ["ROSE", "unstructured", "0.5000", "4/168", "26.38", "96"]
    assert found[5] == ["ROSE", "unstructured", "failed"]
    ends = {
        line.index(value) + len(value) for line, value in zip(text.splitlines()[2:5], ("5.47", "27.68", "26.38"), strict=True)
    }
    assert len(ends) == 1
