"""Checks of whole models: pruning, activations in host memory, collective operations, 2:4 latency and diffusion."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from rose_exp.engine import Allocation, Magnitude, Ordering, Refine, SemiStructured, SparseGPT, Structured, Target, Unstructured
from rose_exp.evaluation import speed
from rose_exp.models import all_linear_layers, find_blocks
from rose_exp.pruning import LayerReport, PassSeconds, PruneContext, PruningPlan, prune_model
from rose_exp.pruning.activations import Activations
from rose_exp.runs.limits import available
from rose_exp.runtime.ranks import Ranks

from .report import SHARED, Report, Setup, Skip

VOCABULARY = 128
SMALL = {"hidden_size": 64, "intermediate_size": 96, "layers": 2, "heads": 4}
MEDIUM = {"hidden_size": 1024, "intermediate_size": 2816, "layers": 3, "heads": 16}

PLANS: dict[str, dict[str, Any]] = {
    "rose": {"ordering": Ordering(threshold=None)},
    "true sequential": {"true_sequential": True},
    "target, allocation": {"target": Target(0.6, 0.4), "allocation": Allocation("losses", 0.1)},
    "refine": {"refine": Refine(4, mask_iterations=4)},
    "permute": {"sparsity": SemiStructured(2, 4), "permute": True},
    "structured": {"sparsity": Structured(0.5)},
}
PERPLEXITY = 0.01  # relative difference of perplexities that rounding may cause
DIFFERENCE = 0.01  # fraction of a mask, and of an output error, that rounding may change: later layers amplify it


def decoder(hidden_size: int, intermediate_size: int, layers: int, heads: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a Llama with random weights on the CPU."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=VOCABULARY,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for block in find_blocks(model).blocks:
        for parameter in block.parameters():
            if parameter.ndim > 1:  # the default initialization makes blocks almost the identity
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.to(dtype)


def tokens_of(windows: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(1))


def plan_of(tiny: bool = True, **options: Any) -> PruningPlan:
    own = {"method": SparseGPT(), "sparsity": Unstructured(0.5), "block_size": 16 if tiny else 128, "batch": 2}
    return PruningPlan(**(own | options))


def pruned(
    sizes: dict[str, int], dtype: torch.dtype, tokens: Tensor, plan: PruningPlan, context: PruneContext
) -> tuple[list[LayerReport], dict[str, Tensor]]:
    """Return the reports and the weights of a pruned decoder."""
    model = decoder(**sizes, dtype=dtype)
    reports = prune_model(model, tokens, plan, context)
    return reports, model.state_dict()


def check_small_models(setup: Setup, report: Report) -> None:
    """Prune a small decoder with every component, and compare with the CPU; float64 uses plain torch, float32 the kernels."""
    tokens = tokens_of(5, 24 if setup.tiny else 64)
    for dtype in (torch.float64, torch.float32):
        for name, options in PLANS.items():
            with report.case(f"{name}, {str(dtype).removeprefix('torch.')}") as facts:
                plan = plan_of(**options)
                expected = pruned(SMALL, dtype, tokens, plan, PruneContext())
                found = pruned(SMALL, dtype, tokens, plan, PruneContext(device=setup.device))
                _compare(facts, found, expected)


def _compare(
    facts: dict[str, Any],
    found: tuple[Sequence[LayerReport], dict[str, Tensor]],
    expected: tuple[Sequence[LayerReport], dict[str, Tensor]],
    difference: float = DIFFERENCE,
) -> None:
    """Compare reports and weights up to rounding, of which ``difference`` is the largest accepted effect."""
    names = [(layer.name, layer.reordered, layer.permuted, layer.removed) for layer in expected[0]]
    assert [(layer.name, layer.reordered, layer.permuted, layer.removed) for layer in found[0]] == names
    moved = [((found[1][name] == 0) != (weight == 0)).double().mean() for name, weight in expected[1].items()]
    facts["mask"] = float(torch.stack(moved).max())
    facts["error"] = max(abs(a.error - b.error) / b.error for a, b in zip(found[0], expected[0], strict=True))
    for name in ("mask", "error"):
        assert facts[name] <= difference, f"{name}: expected a difference of at most {difference:g}, got {facts[name]:.3g}"


def check_command(setup: Setup, report: Report) -> None:
    """Run the command ``rose-exp`` with a small trained model, and compare its perplexity with the CPU."""
    data = SHARED / "data"
    if not data.is_dir():
        raise Skip("needs the model and the texts in the folder ../shared/data beside the checkout")
    method = "rose" if setup.tiny else "rose_plus"  # with an order, refinement, a target and an allocation
    with report.case(f"method={method}") as facts:
        for device in dict.fromkeys(("cpu", setup.device.type)):
            facts[device] = _perplexity(data, [f"method={method}", f"device={device}"], setup.left)
        difference = abs(facts[setup.device.type] / facts["cpu"] - 1)
        assert difference <= PERPLEXITY, f"expected perplexities that differ by at most {PERPLEXITY:g}, got {difference:.3g}"


def _perplexity(data: Path, settings: Sequence[str], seconds: float) -> float:
    """Return the perplexity that a run in a temporary folder records, within the given time."""
    texts = "text/wikitext2_raw_{}.jsonl"
    own = [
        "model=local",
        f"model.path={data}/models/stories260k-llama",
        "sparsity.ratio=0.5",
        "calibration=local",
        f"calibration.path={data / texts.format('train_first1MB')}",
        "calibration.rows=300",
        "calibration.samples=4",
        "calibration.window=128",
        "evaluation=local",
        f"evaluation.perplexity.local.path={data / texts.format('test')}",
        "evaluation.perplexity.local.rows=300",
        "evaluation.perplexity.local.window=128",
        "evaluation.perplexity.local.windows=8",
        "hydra.run.dir=run",
    ]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rose_exp", *settings, *own]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds, check=False)
        assert done.returncode == 0, done.stderr or done.stdout
        record = json.loads((Path(folder) / "run" / "run.json").read_text(encoding="utf-8"))
    return record["metrics"]["perplexity.local"]


def check_activations(setup: Setup, report: Report) -> None:
    """Compare weights with hidden states in host memory, pinned and copied in their own stream, and on the device."""
    report.details["pinned"] = setup.cuda
    with report.case("storage"):
        _check_storage(setup)
    sizes = SMALL if setup.tiny else MEDIUM
    tokens, context = tokens_of(6, 24) if setup.tiny else tokens_of(32, 512), PruneContext(device=setup.device)
    runs: dict[str, dict[str, Tensor]] = {}
    for name, place in (("device", "device"), ("device again", "device"), ("host", "host")):
        plan = plan_of(setup.tiny, ordering=Ordering.rose(), activations=place)
        runs[name] = pruned(sizes, torch.float32, tokens, plan, context)[1]
    with report.case("repeated run"):  # without this, a difference between places would say nothing
        assert _equal(runs["device"], runs["device again"]), "two runs with activations on the device differ"
    with report.case("host equals device"):
        assert _equal(runs["device"], runs["host"])


def _check_storage(setup: Setup) -> None:
    """Read, change and write batches many times, while the device is busy."""
    shape, rounds = ((7, 5, 8), 3) if setup.tiny else ((64, 512, 1024), 10)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    hidden = Activations(shape, torch.float32, "host", setup.device, batch=2)
    busy = torch.randn(64 if setup.tiny else 4096, 64 if setup.tiny else 4096, device=setup.device)
    for piece in hidden.pieces:
        hidden[piece] = values[piece].to(setup.device)
    for _ in range(rounds):
        for piece, batch in hidden:
            busy @= busy  # delays the write, so that a missing synchronization shows
            hidden[piece] = batch * 2
    found = torch.cat([batch for _, batch in hidden]).cpu()
    assert torch.equal(found, values * 2.0**rounds)


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


class OneRank(Ranks):
    """One process that calls the collective operations nevertheless."""

    def __init__(self):
        super().__init__()
        self.size = 2  # :class:`Ranks` does nothing for one process

    def share(self, windows: Tensor) -> Tensor:
        return windows

    def owners(self, costs: Sequence[float]) -> list[int]:
        return [0] * len(costs)

    def gather(self, value: Any) -> list[Any]:
        values = [None]
        dist.all_gather_object(values, value)
        return values


def check_collectives(setup: Setup, report: Report) -> None:
    """Prune through the collective operations of NCCL, or of Gloo on a CPU, with a single rank."""
    backend = "nccl" if setup.cuda else "gloo"
    report.details["backend"] = backend
    if backend == "nccl" and not dist.is_nccl_available():
        raise Skip("this build of torch has no NCCL")
    if setup.cuda:
        torch.cuda.set_device(setup.device)
    tokens = tokens_of(4, 24)
    plan = plan_of(target=Target(0.6, 0.4), allocation=Allocation("losses", 0.1))
    expected = pruned(SMALL, torch.float64, tokens, plan, PruneContext(device=setup.device))
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
        try:
            context = PruneContext(device=setup.device, ranks=OneRank())
            with report.case(backend) as facts:
                found = pruned(SMALL, torch.float64, tokens, plan, context)
                _compare(facts, found, expected)
        finally:
            dist.destroy_process_group()


def check_sparse_speed(setup: Setup, report: Report) -> None:
    """Time forward passes with 2:4 weights in torch's semi-structured kernels."""
    sparsity, dtype = SemiStructured(2, 4), torch.float16
    reason = speed.obstacle(sparsity, setup.device, dtype)
    if reason:
        raise Skip(reason)
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "layers": 2, "heads": 32}
    if setup.tiny:
        sizes = {"hidden_size": 256, "intermediate_size": 512, "layers": 2, "heads": 4}
    model = decoder(**sizes, dtype=dtype)
    plan = plan_of(method=Magnitude(), sparsity=sparsity)
    prune_model(model, tokens_of(2, 32), plan, PruneContext(device=setup.device))
    model.to(setup.device)
    layers = all_linear_layers(find_blocks(model))
    assert speed.obstacle(sparsity, setup.device, dtype, layers) is None
    before = [layer.weight.clone() for layer in layers]
    for windows, length in ((1, 64), (4, 1024)):
        with report.case(f"{windows} x {length} tokens") as facts:
            found = speed.measure(model, layers, tokens_of(windows, length).to(setup.device))
            facts |= vars(found) | {"speedup": found.dense_seconds / found.sparse_seconds}
            assert found.difference <= 1e-2
            assert found.sparse_bytes < 0.7 * found.dense_bytes
            assert all(torch.equal(a, layer.weight) for a, layer in zip(before, layers, strict=True))


def check_diffusion(setup: Setup, report: Report) -> None:
    """Prune small diffusion pipelines package by package, and compare small-sd3 and a U-Net with the CPU."""
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise Skip("diffusers is not installed: pip install 'rose_exp[diffusion]'") from None
    for name in ("sd3",) if setup.tiny else ("sd3", "sd"):
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # convolutions use TF32 by default
        with report.case(f"small-{name}") as facts, exact:
            found = _pruned_pipeline(name, setup.device)
            _compare(facts, found, _pruned_pipeline(name, torch.device("cpu")), difference=0.02)


def _pruned_pipeline(name: str, device: torch.device) -> tuple[list[LayerReport], dict[str, Tensor]]:
    from rose_exp.diffusion import Sampler, candidate_layers, find_units, noise_seeds, split_into_packages
    from rose_exp.diffusion.packages import PackagePruner
    from rose_exp.diffusion.small import small_pipeline
    from rose_exp.engine.weighting import StepWeighting

    prompts, steps = ["a red fox", "two boats"], 2
    pipeline = small_pipeline(name).to(device)
    text = {"text_length": 16} if name == "sd3" else {}
    sampler = Sampler(pipeline, steps=steps, guidance=4.0, size=(32, 32), batch=2, **text)
    layers = {layer.name: layer for layer in candidate_layers(sampler.denoiser, convolutions=False)}
    with torch.no_grad():
        units = find_units(sampler.denoiser, sampler.first_call("a photograph"), list(layers.values())).units
        used = {layer for unit in units for layer in unit.names}
        pruner = PackagePruner(
            sampler,
            {layer: value for layer, value in layers.items() if layer in used},
            split_into_packages(units, 2),
            plan_of(ordering=Ordering.rose()),
            prompts,
            noise_seeds(0, len(prompts)),
            lambda step, total: StepWeighting().weights(total)[step],
            PruneContext(device=device),
        )
        reports = pruner.run()
    return reports, {name: value.cpu() for name, value in sampler.denoiser.state_dict().items()}


class _OutOfTime(Exception):
    """Stops pruning between two blocks."""


MARGIN_BYTES = 16e9  # device memory for statistics and activations, and host memory for everything else


def check_model(setup: Setup, report: Report) -> None:
    """Prune a decoder of LLaMA2-7B's shape with random weights by ROSE to 70 %, on 128 x 2048 tokens."""
    import benchmark_model

    name, dtype = ("tiny", torch.float32) if setup.tiny else ("llama2-7b", torch.float16)
    windows, window = (4, 16) if setup.tiny else (128, 2048)
    blocks = _blocks_that_fit(setup, benchmark_model.SHAPES[name])
    start = time.perf_counter()
    torch.manual_seed(0)
    model = benchmark_model.build(name, blocks, dtype, setup.device)
    tokens = torch.randint(0, model.config.vocab_size, (windows, window))
    benchmark_model.warm_up(setup.device)
    report.details |= {"shape": name, "tokens": [windows, window], "built_seconds": round(time.perf_counter() - start, 3)}

    finished: list[LayerReport] = []
    seconds = PassSeconds()

    def on_layer(_index: int, layer: LayerReport) -> None:
        finished.append(layer)
        last = layer.name.endswith("down_proj")
        if last and setup.left < 0:
            raise _OutOfTime

    plan = PruningPlan(method=SparseGPT(), sparsity=Unstructured(0.7), ordering=Ordering.rose(), batch=4)
    if setup.cuda:
        torch.cuda.reset_peak_memory_stats(setup.device)
    start = time.perf_counter()
    try:
        prune_model(model, tokens, plan, PruneContext(device=setup.device, seconds=seconds, on_layer=on_layer))
        stopped = "memory" if blocks < benchmark_model.SHAPES[name][2] else None
    except _OutOfTime:
        stopped = "time"
    total = time.perf_counter() - start
    pruned_blocks, all_blocks = len(finished) // 7, benchmark_model.SHAPES[name][2]
    report.details |= {
        "blocks": pruned_blocks,
        "blocks_of_shape": all_blocks,
        "reduced_by": stopped if pruned_blocks < all_blocks else None,
        "seconds": round(total, 3),
        "seconds_of_shape_extrapolated": round(total * all_blocks / pruned_blocks, 3) if pruned_blocks < all_blocks else None,
        "seconds_by_work": {key: round(value, 3) for key, value in vars(seconds).items()},
        "reordered": sum(layer.reordered for layer in finished),
        "device_peak_bytes": torch.cuda.max_memory_allocated(setup.device) if setup.cuda else None,
    }
    with report.case("sparsity"):
        assert all(abs(layer.sparsity - 0.7) < 0.01 for layer in finished)
    if not setup.tiny:
        _compare_with_cost_model(setup.device, report, total, pruned_blocks)


def _blocks_that_fit(setup: Setup, shape: tuple[int, ...]) -> int:
    """Return the number of blocks whose half-precision weights fit into the memory of the device and of the host."""
    hidden, mlp, blocks, *_, vocabulary = shape
    if not setup.cuda:
        return blocks
    free = available(Path(tempfile.gettempdir()), setup.device)
    outside, block = 2 * 2 * vocabulary * hidden, 2 * (4 * hidden**2 + 3 * hidden * mlp)
    fit = int((min(free.host, free.device) - MARGIN_BYTES - outside) // block)
    if fit < 1:
        raise Skip(f"needs {(MARGIN_BYTES + outside + block) / 1e9:.0f} GB of device and host memory, got {free}")
    return min(blocks, fit)


def _compare_with_cost_model(device: torch.device, report: Report, seconds: float, blocks: int) -> None:
    import cost_model
    import data_sheets

    hardware = data_sheets.of_device(device)
    if hardware is None:
        return
    phases = cost_model.model(replace(cost_model.LLAMA2_7B, blocks=blocks), Unstructured(0.7))
    report.details["predicted_seconds"] = round(cost_model.predicted(phases, hardware), 3)
    report.details["limit_seconds"] = round(cost_model.limit(phases, hardware), 3)
    if hardware.name == "H200" and blocks == cost_model.LLAMA2_7B.blocks:
        report.target("seconds, LLaMA2-7B shape, ROSE at 70 %", round(seconds, 3), most=60)
