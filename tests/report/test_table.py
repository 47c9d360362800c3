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
