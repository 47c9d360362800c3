"""A rehearsal of the zero-shot evaluation before pruning. It finds questions, lengths and tokens that would stop it afterwards.

Importing this module imports lm-eval, which is slow.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.models.utils import configure_pad_token
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from ..models.shapes import ModelShape
from ..runtime.errors import RoseExpError
from ..runtime.outside import outside_errors
from ..settings.schema import ZeroShotSettings

WHERE = "evaluation.zero_shot"
BATCH = 1024  # texts
GENERATED = 256  # lm-eval's default number of generated tokens


class Rehearsal(LM):
    """A model that keeps every request and gives the same answer to all."""

    def __init__(self):
        super().__init__()
        self.requests: list[Instance] = []

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        self.requests += requests
        return [(-1.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        self.requests += requests
        return [-1.0] * len(requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.requests += requests
        return [""] * len(requests)


def rehearse(manager: TaskManager, settings: ZeroShotSettings) -> list[Instance]:
    """Evaluate a model that needs no time on all questions, and return the requests for it.

    Raises:
        RoseExpError: lm-eval cannot read or score a question.
    """
    model = Rehearsal()
    hint = "; the papers' seven need no hub with evaluation.zero_shot.data=embedded" if settings.data == "hub" else ""
    with outside_errors(f"{WHERE}: cannot read the rows of {', '.join(settings.tasks)}", hint):
        simple_evaluate(
            model=model,
            tasks=list(settings.tasks),
            task_manager=manager,
            num_fewshot=settings.few_shot,
            limit=settings.limit,
            bootstrap_iters=0,
            log_samples=False,
            random_seed=None,  # keep the random state of the run
            numpy_random_seed=None,
            torch_random_seed=None,
        )
        loaded = manager.load(list(settings.tasks))["tasks"]
    for name, task in loaded.items():
        if task.OUTPUT_TYPE == "multiple_choice":
            _check_answers(name, task, settings.limit)
    return model.requests


def _check_answers(name: str, task: Task, limit: int | None) -> None:
    """Check that the correct answer of each question is one of its choices. Otherwise, lm-eval counts every answer as wrong."""
    for number, doc in enumerate(islice(task.eval_docs, limit), start=1):
        with outside_errors(f"{WHERE}: cannot read row {number} of {name}"):
            count = len(choices := task.doc_to_choice(doc))
            gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        for answer in gold if isinstance(gold, list) else [gold]:
            if not (answer in choices if isinstance(answer, str) else isinstance(answer, int) and 0 <= answer < count):
                expected = f"{WHERE}: expected the number of a choice below {count}"
                raise RoseExpError(f"{expected} as the answer of row {number} of {name}, got {answer!r}")


def check_requests(requests: Sequence[Instance], tokenizer: PreTrainedTokenizerBase, shape: ModelShape) -> None:
    """Check that the model can answer all requests.

    Raises:
        RoseExpError: a request has token IDs beyond the embedding, or is longer than the model allows, or needs a special token
            that the tokenizer does not have.
    """
    _check_special_tokens(requests, tokenizer, shape)
    for part in _batches(requests, generated=False):
        contexts, continuations = zip(*(_texts(request) for request in part), strict=True)
        whole = _encode([a + b for a, b in zip(contexts, continuations, strict=True)], tokenizer)
        context_ids = _encode([context.rstrip() for context in contexts], tokenizer)  # lm-eval moves spaces to the continuation
        for request, ids, before in zip(part, whole, context_ids, strict=True):
            shape.check_tokens(WHERE, max(ids, default=0))
            if request.request_type == "loglikelihood":
                _check_length(len(ids) - len(before), request, shape)
    for part in _batches(requests, generated=True):
        for ids in _encode([str(request.args[0]) for request in part], tokenizer):
            shape.check_tokens(WHERE, max(ids, default=0))


def _batches(requests: Sequence[Instance], generated: bool) -> Iterator[list[Instance]]:
    kept = [request for request in requests if (request.request_type == "generate_until") == generated]
    for start in range(0, len(kept), BATCH):
        yield kept[start : start + BATCH]


def _texts(request: Instance) -> tuple[str, str]:
    """Return the context and the continuation of a request."""
    return ("", str(request.args[0])) if len(request.args) == 1 else (str(request.args[0]), str(request.args[1]))


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    with outside_errors(f"{WHERE}: the model's tokenizer cannot encode the questions"):
        return tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids


def _check_length(tokens: int, request: Instance, shape: ModelShape) -> None:
    expected = f"{WHERE}.tasks: expected answers of {request.task_name} of at least one token"
    if tokens < 1:
        raise RoseExpError(f"{expected}, got {request.args[1]!r}")
    if shape.context is not None and tokens > shape.context:
        raise RoseExpError(f"{expected} and at most {shape.context}, the model's maximum sequence length, got {tokens}")


def _check_special_tokens(requests: Sequence[Instance], tokenizer: PreTrainedTokenizerBase, shape: ModelShape) -> None:
    special = dict(_special_tokens(requests, tokenizer))
    for use, token in special.items():
        if token is None:
            raise RoseExpError(f"{WHERE}: expected a tokenizer with a token {use}, got none")
        shape.check_tokens(f"{WHERE}: the token {use}", token)
    for request in requests:
        if request.request_type == "generate_until" and shape.context is not None:
            count = request.args[1].get("max_gen_toks", GENERATED)
            if count >= shape.context:
                raise RoseExpError(
                    f"{WHERE}.tasks: expected fewer generated tokens than {shape.context}, the model's maximum sequence "
                    f"length, got {count} for {request.task_name}"
                )


def _special_tokens(requests: Sequence[Instance], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Any]]:
    """Yield the uses of the special tokens that the requests need, and the token IDs."""
    kinds = {request.request_type for request in requests}
    if any(request.request_type != "generate_until" and not _texts(request)[0] for request in requests):
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        yield "that precedes requests without a context (BOS or EOS)", start
    if "generate_until" in kinds:
        yield "that ends generated text (EOS)", tokenizer.eos_token_id
        with outside_errors(f"{WHERE}: the model's tokenizer cannot pad batches"):
            padding = configure_pad_token(copy.deepcopy(tokenizer)).pad_token_id
        yield "that pads batches", padding
