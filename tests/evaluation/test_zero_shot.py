"""Zero-shot accuracy: stock lm-eval tasks on local rows, compared with a reference implementation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rose_exp.evaluation.zero_shot import AVERAGED, Accuracies, _accuracies, _stock_file, measure, prepared
from rose_exp.evaluation.zero_shot_data import SPLITS, embedded_file, local_file
from rose_exp.models import load_model, load_tokenizer
from rose_exp.runtime.errors import RoseExpError
from rose_exp.settings.schema import ModelSettings, ZeroShotSettings

QUESTIONS = 25


@pytest.fixture(scope="module")
def stories(shared):
    settings = ModelSettings(path=str(shared / "data/models/stories260k-llama"))
    return load_model(settings).model, load_tokenizer(settings)


@pytest.fixture(scope="module")
def shared():
    from ..conftest import SHARED

    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared beside the checkout, with golden cases and data")
    return SHARED


def own_task(folder) -> str:
    """Write a task with three questions; return its folder."""
    (folder / "tasks").mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"Once upon a {i}", "a": "time"}) + "\n" for i in range(3)))
    (folder / "tasks/own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: 0\ndoc_to_choice: ['{{a}}', 'zzz']\n"
        "metric_list: [{metric: acc}]\n"
    )
    return str(folder / "tasks")


def run(stories, folder, **settings) -> Accuracies:
    wanted = ZeroShotSettings(limit=QUESTIONS, **settings)
    with prepared(wanted) as tasks:
        return measure(*stories, tasks, wanted, folder)


@pytest.fixture(scope="module")
def seven(stories, shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    return run(stories, folder, tasks=list(AVERAGED), data_dir=str(shared / "data/zeroshot")), folder


def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """Score ``continuation`` given ``context``, tokenized jointly as in lm-eval, with the BOS of the tokenizer."""
    before = tokenizer(context).input_ids
    both = tokenizer(context + continuation).input_ids
    assert both[0] == tokenizer.bos_token_id
    with torch.no_grad():
        scores = model(torch.tensor([both])).logits[0].float().log_softmax(dim=-1)
    return sum(float(scores[i - 1, both[i]]) for i in range(len(before), len(both)))


@pytest.mark.parametrize("task", ["arc_easy", "openbookqa"])
def test_accuracies_match_the_reference_implementation(stories, shared, seven, task):
    rows = [json.loads(line) for line in local_file(shared / "data/zeroshot", task).path.open()][:QUESTIONS]
    right = 0
    for row in rows:
        context = f"Question: {row['question']}\nAnswer:" if "question" in row else row["question_stem"]
        choices = row["choices"]["text"]
        scores = [log_likelihood(*stories, context, f" {choice}") / len(choice) for choice in choices]
        right += row["choices"]["label"][scores.index(max(scores))] == row["answerKey"]
    found = seven[0]
    assert found.protocol["tasks"][task]["metric"] == "acc_norm"
    assert found.values[task] == pytest.approx(100 * right / len(rows))
    share = right / len(rows)
    assert found.standard_errors[task] == pytest.approx(100 * math.sqrt(share * (1 - share) / (len(rows) - 1)), rel=1e-3)


def test_seven_tasks_report_their_metrics_and_average(seven):
    found, folder = seven
    assert list(found.values) == [*AVERAGED, "average"]
    assert found.values["average"] == pytest.approx(sum(found.values[task] for task in AVERAGED) / 7)
    metrics = {task: facts["metric"] for task, facts in found.protocol["tasks"].items()}
    assert metrics == {task: "acc" if task in ("winogrande", "boolq") else "acc_norm" for task in AVERAGED}
    assert {facts["questions"] for facts in found.protocol["tasks"].values()} == {QUESTIONS}
    assert {facts["few_shot"] for facts in found.protocol["tasks"].values()} == {0}
    own = json.loads((folder / found.protocol["results"]).read_text())  # the format that lm-eval tools read
    assert own["results"]["boolq"]["acc,none"] == pytest.approx(found.values["boolq"] / 100)


def test_standard_error_of_the_average(seven):
    found = seven[0]
    expected = math.sqrt(sum(found.standard_errors[task] ** 2 for task in AVERAGED)) / 7
    assert found.standard_errors["average"] == pytest.approx(expected)


def test_single_question_has_no_standard_error(stories, shared, tmp_path):
    wanted = ZeroShotSettings(tasks=list(AVERAGED), data_dir=str(shared / "data/zeroshot"), limit=1)
    with prepared(wanted) as tasks:
        found = measure(*stories, tasks, wanted, tmp_path)
    assert found.values["average"] == pytest.approx(sum(found.values[task] for task in AVERAGED) / 7)
    assert found.standard_errors == {}


def test_rows_with_an_unexpected_schema_raise_before_evaluation(tmp_path):
    (tmp_path / "piqa_validation.jsonl").write_text('{"question": "?"}\n')
    wanted = ZeroShotSettings(tasks=["piqa"], data_dir=str(tmp_path))
    with pytest.raises(RoseExpError, match="cannot read the rows of piqa"), prepared(wanted):
        pass


def test_no_average_unless_all_seven_tasks_are_present():
    results = {
        "results": {"boolq": {"acc,none": 0.5, "acc_stderr,none": 0.1}, "other": {"f1,none": 0.25, "f1_stderr,none": "N/A"}},
        "n-samples": {},
        "versions": {},
        "n-shot": {},
    }
    found = _accuracies(results, 4, "file")
    assert found.values == {"boolq": 50.0, "other": 25.0}
    assert found.standard_errors == {"boolq": 10.0}


@pytest.mark.parametrize("task", AVERAGED)
def test_tasks_differ_from_stock_tasks_only_in_the_data_source(task, shared):
    """Prompts, metrics and versions equal those of the stock task."""
    from lm_eval.tasks._yaml_loader import load_yaml

    stock = load_yaml(_stock_file(task))
    with prepared(ZeroShotSettings(tasks=[task], data_dir=str(shared / "data/zeroshot"))) as tasks:
        loaded = tasks.manager.load([task])["tasks"][task]
        config = loaded.config
        rows = list(loaded.eval_docs)
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "metric_list", "output_type", "process_docs"):
        ours = getattr(config, key)
        theirs = stock.get(key)
        assert ours == theirs or getattr(ours, "__name__", 1) == getattr(theirs, "__name__", 2), key
    assert config.metadata["version"] == stock["metadata"]["version"]
    assert len(rows) == tasks.protocol["data"][task]["rows"]
    assert len(tasks.protocol["data"][task]["sha256"]) == 64
    assert stock.get("test_split") == ("test" if SPLITS[task] == "test" else None)


@pytest.mark.slow
@pytest.mark.parametrize("task", AVERAGED)
def test_wheel_contains_the_same_rows(task, shared, tmp_path):
    embedded = embedded_file(tmp_path, task)
    local = local_file(shared / "data/zeroshot", task)
    rows = [json.loads(line) for line in embedded.path.open()]
    expected = [json.loads(line) for line in local.path.open()]
    assert rows[: len(expected)] == expected
    assert len(rows) == (10042 if task == "hellaswag" else len(expected))  # the folder holds the first 1000 of them


def test_custom_tasks(stories, tmp_path):
    found = run(stories, tmp_path, tasks=["own"], include_path=own_task(tmp_path))
    assert set(found.values) == {"own"}
    assert found.protocol["tasks"]["own"]["questions"] == 3


def test_protocol_fingerprint_covers_custom_task_files(tmp_path):
    """Runs with different task files are never reported in the same table."""
    settings = ZeroShotSettings(tasks=["own"], include_path=own_task(tmp_path))
    with prepared(settings) as tasks:
        before = tasks.protocol["include_sha256"]
    task = next(Path(settings.include_path).glob("*.yaml"))
    task.write_text(f"{task.read_text()}# changed\n")
    with prepared(settings) as tasks:
        assert tasks.protocol["include_sha256"] != before


@pytest.mark.parametrize(("bos", "starts"), [("tokenizer", True), ("windows", True), ("none", False)])
def test_requests_follow_the_bos_setting(stories, bos, starts, tmp_path, monkeypatch):
    from rose_exp.evaluation.lm_eval_model import PrunedLM

    contexts = []
    score = PrunedLM._loglikelihood_tokens

    def spy(self, requests, **options):
        contexts.extend(context for _, context, _ in requests)
        return score(self, requests, **options)

    monkeypatch.setattr(PrunedLM, "_loglikelihood_tokens", spy)
    wanted = ZeroShotSettings(tasks=["own"], include_path=own_task(tmp_path))
    with prepared(wanted) as tasks:
        measure(*stories, tasks, wanted, tmp_path, bos)
    start = stories[1].bos_token_id
    assert len(contexts) == 6
    assert all((context[0] == start) == starts and start not in context[1:] for context in contexts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["arc_esay"]}, r"expected names of lm-eval's tasks, got 'arc_esay'; did you mean 'arc_easy'"),
        ({"tasks": ["piqa"], "data_dir": "."}, r"data_dir: expected one file piqa\*validation\*.jsonl in .*, got none"),
        ({"tasks": ["piqa"], "data": "hub"}, r"cannot read the rows of piqa: .*zero_shot.data=embedded"),
    ],
)
def test_unavailable_tasks_raise_before_evaluation(settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RoseExpError, match=message), prepared(ZeroShotSettings(**settings)):
        pass


def test_invalid_settings_are_reported():
    assert ZeroShotSettings(tasks=["piqa", "piqa"], few_shot=2, include_path="/nowhere").problems("z") == [
        "z.include_path: expected a folder that exists, got '/nowhere'",
        "z.tasks: expected each task once, got piqa, piqa",
        "z.few_shot: expected 0 or null with local rows, which have no examples, got 2",
    ]
