"""A mixture that does not fit in memory is pruned from disk, with memory for its largest block alone.

The model is a small gpt-oss with 16 experts of width 384. Its moments take more memory than the weights of a block, as in
models with 100 billion parameters.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ..conftest import REPOSITORY

EXPERTS, WIDTH = 16, 384
BLOCK = EXPERTS * 3 * WIDTH**2 * 4  # bytes of the experts of a block
MOMENTS = EXPERTS * 2 * WIDTH**2 * 8  # bytes of the moments of their inputs, summed in float64


def script(folder: Path, body: str) -> dict:
    """Run code in a process of its own, and return the last line that it prints, as JSON."""
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n{textwrap.dedent(body)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory) -> dict[int, Path]:
    """Folders with models by number of blocks."""
    folder = tmp_path_factory.mktemp("mixtures")
    script(
        folder,
        f"""
        import torch, transformers
        for blocks in (2, 8):
            config = transformers.GptOssConfig(
                vocab_size=96, hidden_size={WIDTH}, intermediate_size={WIDTH}, num_hidden_layers=blocks, head_dim=32,
                num_attention_heads=8, num_key_value_heads=2, num_local_experts={EXPERTS}, num_experts_per_tok=2,
                max_position_embeddings=128,
            )
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(f"{{blocks}}")
        print(1)
        """,
    )
    return {blocks: folder / str(blocks) for blocks in (2, 8)}


def peak_bytes(model: Path, limit: int | None) -> int:
    """Return how far pruning from disk raises the peak memory of a process."""
    return script(
        model.parent,
        f"""
        import resource, tempfile, torch
        from pathlib import Path
        from rose_exp.engine import InputMoments, SparseGPT, Unstructured, prune_layer
        from rose_exp.models import open_model
        from rose_exp.pruning import OnDisk, PruneContext, PruningPlan, RunState, prune_model
        from rose_exp.settings.schema import ModelSettings
        from rose_exp.tracking.record import peak_memory

        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

        torch.set_num_threads(1)
        moments = InputMoments(64)
        moments.update(torch.randn(128, 64))
        prune_layer(torch.randn(64, 64), moments, sparsity=Unstructured(0.5))  # compiling takes more memory than the model
        loaded, streamed = open_model(ModelSettings(path={str(model)!r}))
        tokens = torch.randint(3, 96, (4, 64), generator=torch.Generator().manual_seed(0))
        with tempfile.TemporaryDirectory() as folder:
            state = RunState(Path(folder), {{"code": "a"}})
            context = PruneContext(weights=OnDisk(streamed, state.block), state=state, moments_bytes={limit})
            before = resident()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
            prune_model(loaded.model, tokens, PruningPlan(SparseGPT(), Unstructured(0.5)), context)
        print(peak_memory()["host"] - before)
        """,
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of the process from /proc")
def test_memory_depends_on_the_largest_block_alone(mixtures):
    unlimited, limited, shallow = (
        peak_bytes(mixtures[8], None),
        peak_bytes(mixtures[8], BLOCK // 4),
        peak_bytes(mixtures[2], None),
    )
    assert unlimited - limited > 0.6 * (MOMENTS - BLOCK // 4), (unlimited, limited, shallow)
    assert unlimited - shallow < 0.5 * BLOCK, (unlimited, limited, shallow)  # six further blocks
