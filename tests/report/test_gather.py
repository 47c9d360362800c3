"""Grouping of runs into tables and cells, and the statistics of cells."""

from __future__ import annotations

import copy
import math

import pytest
from scipy import stats

from rose_exp.report.cells import Repeat
from rose_exp.report.conditions import conditions
from rose_exp.report.gather import MINUTES, gather
from rose_exp.runtime.errors import RoseExpError

from .records import record

METRIC = "perplexity.wikitext2"


def tables(records, **options):
    return [table for table in gather(records, **options).tables if table.metric == METRIC]


def three_seeds(label: str, *values: float, **options) -> list[dict]:
    return [record(label, value, seed, **options) for seed, value in enumerate(values)]


def test_mean_deviation_and_paired_difference():
    (table,) = tables([*three_seeds("SparseGPT", 20.0, 22.0, 27.0), *three_seeds("ROSE", 19.0, 21.5, 25.5)])
    rose = table.cells["ROSE"]["0.7"]
    assert rose.mean == pytest.approx(22.0)
    assert rose.deviation == pytest.approx(math.sqrt((9 + 0.25 + 12.25) / 2))
    found = rose.difference
    assert found.pairs == 3
    assert found.mean == pytest.approx(-1.0)
    assert found.relative == pytest.approx(-1 / 23)
    expected = stats.ttest_rel([19.0, 21.5, 25.5], [20.0, 22.0, 27.0]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    assert not found.significant
    assert rose.best
    assert not table.cells["SparseGPT"]["0.7"].best
    assert table.cells["SparseGPT"]["0.7"].difference is None


@pytest.mark.parametrize(("metric", "best"), [("kl_divergence", "ROSE"), ("top1_agreement", "SparseGPT")])
def test_a_low_divergence_and_a_high_agreement_are_best(metric, best):
    records = [record("SparseGPT", 20.0), record("ROSE", 19.0)]
    for found, value in zip(records, (0.6, 0.5), strict=True):
        found["config"]["evaluation"]["divergence"] = True
        found["metrics"][f"{metric}.wikitext2"] = value
    (table,) = [table for table in gather(records).tables if table.metric == f"{metric}.wikitext2"]
    assert [name for name, cells in table.cells.items() if cells["0.7"].best] == [best]
    assert table.cells["ROSE"]["0.7"].difference.mean == pytest.approx(-0.1)
    assert "protocol.evaluation.window" in table.conditions


def test_one_seed_has_no_interval():
    (table,) = tables([record("SparseGPT", 20.0), record("ROSE", 19.0)])
    cell = table.cells["ROSE"]["0.7"]
    assert cell.deviation is None
    assert (cell.difference.mean, cell.difference.low, cell.difference.pairs) == (-1.0, None, 1)


def test_only_seeds_with_equal_windows_are_paired():
    sparsegpt = three_seeds("SparseGPT", 20.0, 22.0, 24.0)
    rose = [*three_seeds("ROSE", 19.0, 20.0), record("ROSE", 1.0, 5)]
    rose[1]["protocol"]["calibration"]["tokens_sha256"] = "other windows"
    (table,) = tables([*sparsegpt, *rose])
    assert table.cells["ROSE"]["0.7"].difference.pairs == 1
    assert table.cells["ROSE"]["0.7"].difference.mean == -1.0


def test_only_seeds_with_equal_noise_are_paired():
    """Diffusion models draw noise instead of windows."""
    runs = [*three_seeds("SparseGPT", 20.0, 22.0), *three_seeds("ROSE", 19.0, 20.0)]
    for run in runs:
        calibration = run["protocol"]["calibration"]
        calibration["noise_sha256"] = calibration.pop("tokens_sha256")
    runs[-1]["protocol"]["calibration"]["noise_sha256"] = "other noise"
    (table,) = tables(runs)
    assert table.cells["ROSE"]["0.7"].difference.pairs == 1
    assert table.cells["ROSE"]["0.7"].difference.mean == -1.0


def test_options_in_addition_to_the_method_form_separate_rows():
    """Options without effect do not form rows; the dense model has its own row."""
    plain = three_seeds("SparseGPT", 20.0, 22.0, 27.0, config__pipeline__permute=True)
    owl = three_seeds("SparseGPT", 19.0, 21.0, 26.0, config__allocation={"rule": "owl", "spread": 0.08, "outlier": 5.0})
    steps = three_seeds("SparseGPT", 18.0, 20.0, 25.0, config__refine={"steps": 8, "mask_iterations": 0})
    moved = three_seeds("SparseGPT", 17.0, 19.0, 24.0, config__target={"strength": 0.5, "residual": 0.5})
    uniform = three_seeds("ROSE", 16.0, 18.0, 23.0, config__allocation={"rule": "uniform", "spread": 0.1, "outlier": 5.0})
    for label, runs in (("SparseGPT + OWL", owl), ("SparseGPT + CG", steps), ("SparseGPT + target", moved)):
        for run in runs:
            run["label"] = label
    (table,) = tables([record("Dense", 5.0), *plain, *owl, *steps, *moved, *uniform])
    rows = ["Dense", "SparseGPT", "SparseGPT + OWL", "SparseGPT + CG", "SparseGPT + target", "ROSE"]
    assert list(table.cells) == rows
    assert [table.cells[row]["0.7"].difference.mean for row in rows[2:]] == pytest.approx([-1.0, -2.0, -3.0, -4.0])


def test_channel_permutation_forms_a_separate_row_where_it_has_an_effect():
    runs = [record("SparseGPT", 20.0, pattern="2:4"), record("SparseGPT", 19.0, pattern="2:4", config__pipeline__permute=True)]
    runs[1]["label"] = "SparseGPT + permuted"
    (table,) = tables(runs)
    assert {row: cells["2:4"].mean for row, cells in table.cells.items()} == {"SparseGPT": 20.0, "SparseGPT + permuted": 19.0}


def test_sparsities_are_sorted_columns():
    records = [record("ROSE", 1.0, ratio=ratio) for ratio in (0.9, 0.5, 0.7)] + [record("ROSE", 2.0, pattern="2:4")]
    (table,) = tables(records)
    assert table.names == ["0.5", "0.7", "0.9", "2:4"]


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("config__engine__damping", 0.1),
        ("config__engine__backend", "torch"),
        ("config__pipeline__layers", ["*.mlp.*"]),
        ("config__calibration__samples", 64),
        ("protocol__calibration__sha256", "other text"),
        ("protocol__calibration__cut", "windows"),
        ("protocol__evaluation__wikitext2", {"source": "wikitext", "sha256": "w2", "windows": 166, "window": 4096}),
        ("protocol__model__revision", "def"),
        ("protocol__model__dtype", "bfloat16"),
        ("protocol__versions__torch", "2.6.0"),
        ("protocol__revision", "other code"),
        ("protocol__device", "cuda: H100"),
        ("protocol__threads", 1),
    ],
)
def test_different_protocols_never_share_a_cell(change, value):
    records = [record("SparseGPT", 20.0, 0), record("SparseGPT", 30.0, 1, **{change: value})]
    report = gather(records)
    of_metric = [table for table in report.tables if table.metric == METRIC]
    assert [[list(c.values.values()) for row in t.cells.values() for c in row.values()] for t in of_metric] == [
        [[20.0]],
        [[30.0]],
    ]
    assert [table.letter for table in of_metric] == ["A", "B"]
    name = change.partition("__")[2] if change.startswith("config") else change
    name = name.replace("__", ".").replace("protocol.evaluation.wikitext2", "protocol.evaluation.window")
    assert name in report.differences[f"Llama-2-7b-hf: {METRIC}"]
    allowed = gather(records, allowed=[name])
    assert len([table for table in allowed.tables if table.metric == METRIC]) == 1


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("config__device", "cuda:1"),
        ("config__tracking", {"kind": "wandb"}),
        ("config__tags", ["x"]),
        ("config__pipeline__activations", "disk"),
        ("config__calibration__path", "/elsewhere/c4.jsonl"),  # the fingerprint identifies the text
        ("protocol__calibration__source", "/elsewhere/c4.jsonl"),
    ],
)
def test_settings_without_effect_do_not_split_tables(change, value):
    (table,) = tables([record("SparseGPT", 20.0, 0), record("SparseGPT", 30.0, 1, **{change: value})])
    assert table.cells["SparseGPT"]["0.7"].mean == 25.0


def test_dense_model_is_in_every_table_with_its_evaluation_protocol():
    records = [
        record("Dense", 5.0),
        record("SparseGPT", 20.0),
        record("SparseGPT", 21.0, config__engine__damping=0.1),
        record("SparseGPT", 22.0, protocol__model__revision="def"),
    ]
    found = tables(records)
    assert len(found) == 3
    has_dense = {table.conditions["protocol.model.revision"]: "Dense" in table.cells for table in found}
    assert has_dense == {"abc": True, "def": False}
    assert all(next(iter(t.cells)) == "Dense" for t in found if "Dense" in t.cells)


def test_any_setting_can_define_the_columns():
    records = [record("SparseGPT", 20.0 + b, config__engine__block_size=b) for b in (64, 128)]
    records += [record("ROSE", 19.0 + b, config__engine__block_size=b) for b in (64, 128)]
    (table,) = tables(records, columns="engine.block_size")
    assert table.names == ["64", "128"]
    assert table.cells["ROSE"]["128"].difference.mean == -1.0
    samples = [
        record("ROSE", float(n), config__calibration__samples=n, protocol__calibration__windows=n) for n in (16, 128)
    ]  # fmt: skip
    (table,) = tables(samples, columns="calibration.samples")
    assert table.names == ["16", "128"]


def diffusion_record(label: str, value: float, seed: int = 0, **changes) -> dict:
    """Return the record of a run of a diffusion model with a metric of its images."""
    images = {"samples": 100}
    made = record(label, 0.0, seed, config__model__kind="diffusion", config__evaluation__images=images, **changes)
    made["metrics"] = {"images.digit_distance": value}
    made["protocol"] |= {"evaluation": None, "images": {"source": "digit_prompts", "sha256": "prompts", "prompts": 100}}
    return made


def test_numbers_of_prompts_from_one_list_share_a_table():
    """Their fingerprint is that of the prompts in use, so it differs between the columns."""
    records = []
    for samples, path in [(10, None), (100, None), (10, "mine.txt"), (100, "mine.txt")]:
        made = diffusion_record(
            "SparseGPT", float(samples), config__calibration__samples=samples, config__calibration__path=path
        )
        made["protocol"]["calibration"] = {
            "source": path or "prompts",
            "prompts": samples,
            "sha256": f"{path} {samples}",
            "seed": 0,
            "noise_sha256": f"noise {samples}",
        }
        records.append(made)
    for columns, names in (("calibration.samples", [["10", "100"]] * 2), ("sparsity", [["0.7"]] * 4)):
        found = [table for table in gather(records, columns=columns).tables if table.metric == "images.digit_distance"]
        assert [table.names for table in found] == names


@pytest.mark.parametrize(
    ("columns", "values"),
    [("steps", (10, 25, 50)), ("guidance", (1.0, 2.0)), ("scheduler", ("DDIMScheduler", "EulerDiscreteScheduler"))],
)
def test_dense_models_that_depend_on_the_columns_are_in_their_own(columns, values):
    records = []
    for place, value in enumerate(values):
        for label, offset in (("Dense", 1.0), ("SparseGPT", 2.0)):
            records.append(diffusion_record(label, place + offset, **{f"config__diffusion__{columns}": value}))
    found = gather(records, columns=f"diffusion.{columns}")
    (table,) = [table for table in found.tables if table.metric == "images.digit_distance"]
    assert not found.left_out
    for label, offset in (("Dense", 1.0), ("SparseGPT", 2.0)):
        assert [table.cells[label][name].mean for name in table.names] == [place + offset for place in range(len(values))]


@pytest.mark.parametrize(
    ("columns", "fact", "metric"),
    [
        ("diffusion.scheduler", "model.scheduler", "images.digit_distance"),
        ("model.dtype", "model.dtype", "images.digit_distance"),
        ("model.path", "model.sha256", "images.digit_distance"),
        ("evaluation.images.samples", "images.prompts", "images.digit_distance"),
        ("evaluation.images.path", "images.sha256", "images.digit_distance"),
        ("calibration.path", "calibration.sha256", "images.digit_distance"),
    ],
)
def test_facts_that_follow_from_the_columns_do_not_split_tables(columns, fact, metric):
    records = []
    for value in ("one", "other"):
        made = diffusion_record("SparseGPT", 1.0, **{f"config__{columns.replace('.', '__')}": value})
        made["protocol"]["calibration"] = {"source": "prompts", "prompts": 10, "sha256": "a", "seed": 0, "noise_sha256": "b"}
        part, name = fact.split(".")
        made["protocol"][part] = made["protocol"][part] | {name: value}
        records.append(made)
    (table,) = [table for table in gather(records, columns=columns).tables if table.metric == metric]
    assert sorted(table.names) == ["one", "other"]
    records[1]["config"] = copy.deepcopy(records[0]["config"])  # the fact differs without the setting
    assert len([table for table in gather(records, columns="sparsity").tables if table.metric == metric]) == 2


@pytest.mark.parametrize(
    ("columns", "part", "name", "metric"),
    [
        ("evaluation.perplexity.wikitext2.window", "evaluation.wikitext2", "tokens_sha256", METRIC),
        ("evaluation.zero_shot.limit", "zero_shot", "documents", "zero_shot.piqa"),
        ("evaluation.speed.window", "speed", "window", "speed.tokens"),
    ],
)
def test_facts_of_evaluations_follow_from_their_settings(columns, part, name, metric):
    found = []
    for value in (512, 1024):
        made = record("SparseGPT", 1.0, **{f"protocol__{part.replace('.', '__')}__{name}": f"fact {value}"})
        made["metrics"][metric] = 1.0
        found.append(conditions(made, metric, columns))
    assert found[0] == found[1]
    assert conditions(made, metric, "engine.block_size") != conditions(record("SparseGPT", 1.0), metric, "engine.block_size")


def test_dense_models_depend_on_every_column_that_changes_their_metric():
    """Zero-shot tables exist for each column. Sparsity and calibration do not change a dense model."""
    records = []
    for dtype, window, shift in (("float32", 2048, 0), ("bfloat16", 1024, 10)):
        texts = {"wikitext2": {"dataset": "Salesforce/wikitext", "window": window}}
        for label, value in (("Dense", 1.0), ("SparseGPT", 2.0)):
            made = record(label, value + shift, config__model__dtype=dtype, config__evaluation__perplexity=texts)
            made["protocol"]["model"]["dtype"] = dtype
            made["protocol"]["evaluation"]["wikitext2"]["window"] = window
            made["metrics"]["zero_shot.piqa"] = value + shift
            records.append(made)
    found = gather(records, columns="model.dtype", allowed=["evaluation", "protocol.evaluation"])
    assert not found.left_out
    metrics = {table.metric: table for table in found.tables}
    means = {n: c.mean for n, c in metrics["perplexity.wikitext2"].cells["Dense"].items()}
    assert means == {"float32": 1.0, "bfloat16": 11.0}
    zero_shot = {table.at: table.cells for table in found.tables if table.metric == "zero_shot"}
    assert {at: cells["Dense"]["piqa"].mean for at, cells in zero_shot.items()} == {"float32": 1.0, "bfloat16": 11.0}
    for columns in ("sparsity", "calibration.samples", "engine.block_size"):
        same = gather([records[0], records[1]], columns=columns)
        (table,) = [table for table in same.tables if table.metric == "perplexity.wikitext2"]
        assert table.cells["Dense"].keys() == table.cells["SparseGPT"].keys()


def test_threshold_columns_do_not_split_row_names():
    records = []
    for threshold in (0.25, 0.5):
        made = record("ROSE", 10 * threshold, config__reorder__threshold=threshold)
        made["label"] = "ROSE" if threshold == 0.5 else "SparseGPT reordered"
        records.append(made)
    (table,) = tables(records, columns="reorder.threshold")
    assert list(table.cells) == ["ROSE"]
    assert table.names == ["0.25", "0.5"]


def test_variants_of_a_method_form_separate_rows():
    records = [record("DSnoT", 1.0), record("DSnoT", 2.0, config__method__options={"initial": "sparsegpt"})]
    records[0]["config"]["method"]["options"] = {"initial": "wanda"}
    (table,) = tables(records)
    assert list(table.cells) == ["DSnoT (initial=wanda)", "DSnoT (initial=sparsegpt)"]


def test_unfinished_runs_are_listed_and_repeated_runs_count_once():
    failed = record("ROSE", 1.0) | {"status": "failed", "error": "RoseExpError: no disk", "run_id": "f"}
    report = gather([record("ROSE", 20.0), record("ROSE", 21.0), failed])
    assert report.runs == 1
    assert report.left_out == ["ROSE f failed: RoseExpError: no disk"]
    assert report.tables[0].cells["ROSE"]["0.7"].values == {Repeat(0): 21.0}


def test_tasks_are_columns_of_one_table_per_sparsity():
    made = [record("SparseGPT", 1.0, ratio=r) for r in (0.5, 0.7)] + [record("Dense", 1.0)]
    for i, one in enumerate(made):
        one["metrics"] |= {"zero_shot.piqa": 50.0 + i, "zero_shot.average": 40.0 + i}
        one["protocol"]["zero_shot"] = {"limit": None, "results": f"results_{i}.json"}
    found = [table for table in gather(made).tables if table.metric == "zero_shot"]
    assert [(table.at, table.names) for table in found] == [("0.5", ["piqa", "average"]), ("0.7", ["piqa", "average"])]
    assert all(table.cells["Dense"]["piqa"].mean == 52.0 for table in found)
    assert found[1].cells["SparseGPT"]["average"].mean == 41.0


def test_pruning_minutes_form_a_table():
    (table,) = [table for table in gather([record("ROSE", 1.0), record("Dense", 1.0)]).tables if table.metric == MINUTES]
    assert table.cells["ROSE"]["0.7"].mean == 1.5
    assert "Dense" not in table.cells


def test_sparsities_split_tables_with_other_columns():
    records = [record("SparseGPT", 10.0, ratio=0.5), record("SparseGPT", 30.0, ratio=0.7), record("ROSE", 9.0, ratio=0.5)]
    found = tables(records, columns="engine.block_size")
    assert sorted(table.cells["SparseGPT"]["128"].mean for table in found) == [10.0, 30.0]
    assert {table.title().partition("sparsity ")[2].split(" (")[0] for table in found} == {
        "0.5 unstructured",
        "0.7 unstructured",
    }


def test_second_run_for_the_same_cell_is_listed():
    other = record("SparseGPT", 30.0, config__engine__damping=0.1)
    report = gather([record("SparseGPT", 10.0), other], allowed=["engine.damping"])
    assert report.tables[0].cells["SparseGPT"]["0.7"].values == {Repeat(0): 10.0}
    assert report.left_out[0].startswith(f"SparseGPT {other['run_id']}: another run occupies its cell in Llama-2-7b-hf")


def test_repeated_run_on_another_device_is_in_a_separate_table():
    first, again = record("SparseGPT", 10.0), record("SparseGPT", 10.5)
    again["protocol"]["device"] = "cuda: H100"
    assert [table.letter for table in tables([first, again])] == ["A", "B"]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_non_finite_perplexity_affects_only_its_own_cell(value):
    (table,) = tables([*three_seeds("SparseGPT", 20.0, 22.0, 24.0), *three_seeds("ROSE", 19.0, value, 20.0)])
    assert table.cells["ROSE"]["0.7"].deviation is None
    assert table.cells["ROSE"]["0.7"].difference is None
    assert table.cells["SparseGPT"]["0.7"].deviation == 2.0


def test_minutes_include_shared_work_and_exclude_studies():
    made = record("ROSE", 1.0)
    made["seconds"] |= {"pruning": 600.0, "pruning.studying": 540.0, "pruning.shared": 30.0}
    (table,) = [table for table in gather([made]).tables if table.metric == MINUTES]
    assert table.cells["ROSE"]["0.7"].mean == 1.5


def test_unknown_baseline_raises_an_error():
    with pytest.raises(RoseExpError, match="--baseline: expected one of ROSE, got 'Rose'"):
        gather([record("ROSE", 1.0)], baseline="Rose")
    assert gather([record("ROSE", 1.0)]).tables  # the default baseline may be missing


def test_run_with_additional_metrics_is_not_a_conflict():
    more = record("SparseGPT", 10.0)
    more["run_id"] = "more"
    more["metrics"]["perplexity.c4"] = 12.0
    more["protocol"]["evaluation"]["c4"] = {"source": "c4", "sha256": "c", "windows": 256, "window": 2048}
    report = gather([record("SparseGPT", 10.0), more])
    assert not [line for line in report.left_out if METRIC in line]
    assert {table.metric for table in report.tables} == {METRIC, "perplexity.c4", MINUTES}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"columns": "engine.blocksize"},
            "--columns: expected the name of a setting, got 'engine.blocksize'; did you mean 'engine.",
        ),
        ({"columns": "sparsty"}, "--columns: expected the name of a setting, got 'sparsty'; did you mean 'sparsity'?"),
        ({"columns": ""}, "--columns: expected the name of a setting, got ''"),
        ({"columns": "engine."}, "--columns: expected the name of a setting, got 'engine.'; did you mean 'engine'?"),
        ({"columns": "None"}, "--columns: expected the name of a setting, got 'None'"),
        (
            {"allowed": ["engine.dampign"]},
            "--allow: expected the name of a setting, got 'engine.dampign'; did you mean 'engine.damping'?",
        ),
        ({"allowed": ["engine", "x"]}, "--allow: expected the name of a setting, got 'x'"),
    ],
)
def test_unknown_settings_are_an_error_with_a_suggestion(options, message):
    with pytest.raises(RoseExpError) as error:
        gather([record("ROSE", 26.0), record("SparseGPT", 27.0)], **options)
    assert str(error.value).startswith(message)


def test_every_name_that_a_report_lists_as_different_is_known():
    """The names under "Not in one table" can be used for --allow."""
    records = [record("ROSE", 26.0), record("ROSE", 27.0, protocol__evaluation__wikitext2__window=1024, protocol__threads=4)]
    (names, _) = gather(records).differences.values()
    assert {"protocol.evaluation.window", "protocol.threads"} <= set(names)
    assert not gather(records, allowed=list(names)).differences


@pytest.mark.parametrize(
    "columns", ["sparsity", "engine.block_size", "engine", "calibration.samples", "method.options", "tags"]
)
def test_settings_and_groups_are_known_columns(columns):
    assert gather([record("ROSE", 26.0)], columns=columns).tables
