"""Frozen results: small configurations whose metrics, layer reports and weights must not change.

Each file in ``frozen_results`` holds the results of one environment. ``test_frozen.py`` compares the results of the current
environment exactly. After a change that is meant to alter numbers, regenerate the results in every environment. On a new
processor type, generate them from a commit that is known to be correct::

    python -m tests.runs.frozen --write                # all configurations
    python -m tests.runs.frozen --write rose "rose,*"  # matching configurations
    python -m tests.runs.frozen                        # compare only

Floating-point results are bitwise reproducible only on one processor type, with fixed versions of the numeric libraries and
a single thread. Each file records its environment, and every configuration runs with one thread.

``frozen_cases.py`` holds the configurations and the field names.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import argparse
import hashlib
import importlib.metadata
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numba
import torch
import transformers
from safetensors.torch import load_file

import rose_exp
from rose_exp.runtime.signals import Interrupted

from .frozen_cases import (
    DIFFUSION,
    DIFFUSION_BASE,
    INPUTS,
    LANGUAGE,
    LANGUAGE_BASE,
    LATENT_ERRORS,
    LAYER_FIELDS,
    LAYER_NAME,
    LAYER_VALUES,
    METRICS,
    MODELS,
    NAMES,
    NOT_FROZEN,
    PACKAGE_LAYERS,
    PACKAGES,
    PARAMETERS,
    RANKS,
    SAME,
    STUDIES,
    STUDY_FIELDS,
    TIMED_METRICS,
)

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DATA = REPOSITORY.parent / "shared" / "data"
FOLDER = Path(__file__).with_name("frozen_results")
DIGITS = 16  # hexadecimal digits kept of each digest except that of the weights


def result_of(name: str, scratch: Path) -> dict[str, Any]:
    """Run a configuration in an empty folder and return its values to freeze."""
    overrides, way = _overrides(name)
    for model in MODELS:
        if f"<{model}>" in overrides:
            overrides = overrides.replace(f"<{model}>", str(_build(model, scratch / model)))
    arguments = overrides.replace("<data>", str(DATA)).split()
    with _one_thread():
        kind, *number = way.split()
        record, folder = WAYS[kind](arguments, scratch / "out", *map(int, number))
    return _frozen(record, folder)


def deviations(results: Mapping[str, Mapping[str, Any]], name: str, got: Mapping[str, Any]) -> list[str]:
    """Return one line for each value that differs from the frozen result."""
    if name not in SAME:
        return differences(results.get(name), got)
    own, expected = dict(got), dict(results.get(SAME[name][0], {}))
    for result in (own, expected):
        result.pop("packages", None)  # the record of a resumed run lacks packages that finished earlier
    return differences(expected, own)


def _overrides(name: str) -> tuple[str, str]:
    """Return the overrides of a configuration and the key in ``WAYS`` of how to run it."""
    if name in SAME:
        of, more, way = SAME[name]
        return f"{_overrides(of)[0]} {more}", way
    if name in DIFFUSION:
        return f"{DIFFUSION_BASE} {DIFFUSION[name]}", "run"
    own, way = (RANKS[name], "ranks") if name in RANKS else (LANGUAGE[name], "run")
    return f"{LANGUAGE_BASE} {own}", way


def _build(model: str, folder: Path) -> Path:
    """Save a model with random weights and the tokenizer of the trained model."""
    kind, arguments = MODELS[model]
    built = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**arguments))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(built.named_parameters()):
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5, generator=generator)
            if name.endswith("fc1.bias"):
                parameter[:5] = -100  # dead neurons
    built.save_pretrained(folder)
    for file in (DATA / "models" / "stories260k-llama").glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)  # do not copy the read-only permissions
    return folder


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


def _run(arguments: list[str], folder: Path) -> tuple[dict[str, Any], Path]:
    record = rose_exp.run(arguments, folder)
    return record, folder / record["run_id"]


def _crash(arguments: list[str], folder: Path, number: int) -> tuple[dict[str, Any], Path]:
    """Crash right after commit ``number`` of the state, then resume."""

    def fail() -> None:
        raise _Failure

    with _at_call(os, "replace", number, fail, lambda _source, target: Path(target).name == "state.json"):
        return _resumed(arguments, folder, _Failure)


def _stop(arguments: list[str], folder: Path, number: int) -> tuple[dict[str, Any], Path]:
    """Send SIGTERM at Hessian factorization ``number``, inside a block after the first, then resume."""
    with _at_call(torch.linalg, "cholesky_ex", number, lambda: signal.raise_signal(signal.SIGTERM)):
        return _resumed(arguments, folder, Interrupted, "part-*")


def _resumed(arguments: list[str], folder: Path, stops: type[BaseException], kept: str = "*") -> tuple[dict[str, Any], Path]:
    try:
        rose_exp.run(arguments, folder)
    except stops:
        (state,) = folder.glob("*/state")
        if not list(state.glob(kept)):
            raise AssertionError(f"expected {kept} in the state of the interrupted run, got {list(state.iterdir())}") from None
    else:
        raise AssertionError("the run was not interrupted")
    record, place = _run(arguments, folder)
    if not record.get("resumed"):
        raise AssertionError("the second run did not resume")
    return record, place


class _Failure(Exception):
    """Simulated crash."""


@contextmanager
def _at_call(
    owner: Any, name: str, number: int, act: Callable[[], None], counts: Callable[..., bool] = lambda *_, **__: True
) -> Iterator[None]:
    """Call ``act`` once, after call ``number`` of ``owner.name`` among those whose arguments ``counts`` accepts."""
    original, seen = getattr(owner, name), 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal seen
        result = original(*arguments, **options)
        seen += counts(*arguments, **options)
        if seen == number:
            seen += 1
            act()
        return result

    setattr(owner, name, wrapped)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _sweep(arguments: list[str], folder: Path) -> tuple[dict[str, Any], Path]:
    """Run as the last job of a sweep whose runs share the moments of the first block."""
    record = rose_exp.sweep(arguments, folder)[-1]
    return record, folder / record["run_id"]


def _ranks(arguments: list[str], folder: Path) -> tuple[dict[str, Any], Path]:
    """Run in two processes with one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "rose_exp"]
    place = folder / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments, f"hydra.run.dir={place}"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads((place / "run.json").read_text(encoding="utf-8")), place


WAYS = {"run": _run, "crash": _crash, "stop": _stop, "sweep": _sweep, "ranks": _ranks}


def _frozen(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the values to freeze from a finished run.

    Layer errors are stored as they are. Every other layer field is stored as a single value if it is equal in all layers, and
    as a digest of the values by layer otherwise.
    """
    if record["status"] != "finished":
        raise AssertionError(f"the run is {record['status']}: {record['error']}")
    layers = {layer[LAYER_NAME]: layer for layer in record["layers"]}
    for layer in layers.values():
        if other := sorted(set(layer) ^ (set(LAYER_FIELDS.values()) | NOT_FROZEN)):
            raise AssertionError(f"expected layer fields as in LAYER_FIELDS and NOT_FROZEN, got a difference in {other}")
    fields = {frozen: _column(layers, frozen, current) for frozen, current in LAYER_FIELDS.items()} if layers else {}
    errors = fields.pop("error", {})
    kept = {
        "inputs": {name: value[:DIGITS] for name, path in INPUTS.items() if (value := _at(record, path)) is not None},
        "metrics": _metrics(record["metrics"]),
        "standard_errors": _metrics(record["standard_errors"]),
        "parameters": _at(record, PARAMETERS),
        "latent_errors": _at(record, LATENT_ERRORS),
        "packages": [_digest(package[PACKAGE_LAYERS]) for package in _at(record, PACKAGES) or ()],
        "errors": errors,
        "layers": {name: _summary(values) for name, values in fields.items()},
        "studies": {path.name: _study(path) for path in sorted(folder.glob(STUDIES))},
        "weights": _weights(folder / "model"),
    }
    return {name: value for name, value in kept.items() if value}


def _column(layers: Mapping[str, Mapping[str, Any]], frozen: str, current: str) -> dict[str, Any]:
    names = LAYER_VALUES.get(frozen, {})
    return {name: names.get(layer[current], layer[current]) for name, layer in sorted(layers.items())}


def _summary(values: Mapping[str, Any]) -> Any:
    different = {_text(value): value for value in values.values()}
    return next(iter(different.values())) if len(different) == 1 else f"sha256:{_digest(values)}"


def _metrics(values: Mapping[str, float]) -> dict[str, float]:
    return {METRICS.get(name, name): value for name, value in sorted(values.items()) if name not in TIMED_METRICS}


def _study(path: Path) -> str:
    study = json.loads(path.read_text(encoding="utf-8"))
    return _digest({frozen: study[current] for frozen, current in STUDY_FIELDS.items()})


def _at(record: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = record
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _text(value: Any) -> str:
    """Return JSON text that is equal exactly for equal values, including NaN."""
    return json.dumps(value, sort_keys=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(_text(value).encode()).hexdigest()[:DIGITS]


def _weights(folder: Path) -> str:
    """Return the SHA-256 of all tensors of a saved model (names, dtypes, shapes, bytes), regardless of sharding."""
    tensors = {}
    for file in folder.rglob("*.safetensors"):
        part = file.parent.relative_to(folder).as_posix()
        tensors |= {f"{part}/{name}": tensor for name, tensor in load_file(file).items()}
    if not tensors:
        raise AssertionError(f"expected a saved model, got no .safetensors file in {folder}")
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def differences(expected: Any, got: Any, where: str = "") -> list[str]:
    """Return one line for each value that differs."""
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        names = list(dict.fromkeys([*expected, *got]))
        return [line for n in names for line in differences(expected.get(n), got.get(n), f"{where}: {n}" if where else n)]
    return [] if _text(expected) == _text(got) else [f"{where}: expected {_text(expected)}, got {_text(got)}"]


def environment() -> dict[str, str]:
    """Return everything the results depend on apart from code and data."""
    info = Path("/proc/cpuinfo")
    facts: dict[str, str] = {}
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    names = ("model name", "cpu family", "model", "stepping")
    cpu = ", ".join(f"{name} {facts.get(name, 'unknown')}" for name in names)
    libraries = ("torch", "transformers", "diffusers", "numpy", "scipy", "numba")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    return {"cpu": cpu, "instructions": torch.backends.cpu.get_cpu_capability()} | versions


def file_of(facts: Mapping[str, str]) -> Path:
    """Return the result file for the processor of an environment."""
    vendor = re.sub(r"\W.*", "", facts["cpu"].removeprefix("model name ")).lower()
    numbers = re.findall(r"cpu family (\w+), model (\w+)", facts["cpu"])
    return FOLDER / f"{'-'.join([vendor, *(numbers[0] if numbers else ())])}.json"


def read(file: Path) -> dict[str, Any]:
    """Return the content of a result file: the environment and the results by configuration."""
    return json.loads(file.read_text(encoding="utf-8"))


def _write(file: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the result file with one line per part of a result for readable diffs."""
    lines = ["{", f'"environment": {_text(environment())},', '"results": {']
    for number, (name, result) in enumerate(results.items()):
        parts = [f"  {json.dumps(part)}: {_text(value)}" for part, value in result.items()]
        lines += [f"{json.dumps(name)}: {{", ",\n".join(parts), "}" if number == len(results) - 1 else "},"]
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join([*lines, "}", "}"]) + "\n", encoding="utf-8")


def equal_weights(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return the groups of configurations with equal weights."""
    names: dict[str, list[str]] = {}
    for name, result in results.items():
        names.setdefault(result["weights"], []).append(name)
    return [equal for equal in names.values() if len(equal) > 1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.runs.frozen", description=__doc__.partition("\n")[0])
    parser.add_argument("patterns", nargs="*", default=["*"], help="names of configurations; default: all")
    parser.add_argument("--write", action="store_true", help="write the results instead of comparing them")
    arguments = parser.parse_args()
    chosen = [name for name in NAMES if any(fnmatchcase(name, pattern) for pattern in arguments.patterns)]
    file = file_of(environment())
    before = read(file) if file.exists() else {"environment": {}, "results": {}}
    if before["environment"] != environment() and (not arguments.write or set(chosen) != set(NAMES)):
        print(f"no results for this environment in {file}:", *differences(before["environment"], environment()), sep="\n  ")
        return 2
    results, failed = dict(before["results"]), 0
    for name in chosen:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            try:
                result = result_of(name, Path(scratch))
            except Exception as error:  # keep running the other configurations
                print(f"        {name}: failed: {type(error).__name__}: {error}")
                failed += 1
                continue
        if arguments.write and name not in SAME:
            results[name] = result
        different = deviations(results, name, result)
        failed += bool(different)
        outcome = "differs" if different else "equal"
        print(f"{time.perf_counter() - start:5.1f} s  {name}: {outcome}", *different[:20], sep="\n    ", flush=True)
    if arguments.write:
        _write(file, {name: results[name] for name in NAMES if name in results})
        print(f"wrote {file}, {file.stat().st_size} bytes")
        print("equal weights:", *map(" = ".join, equal_weights(results)), sep="\n  ")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
