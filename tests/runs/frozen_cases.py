"""Configurations of :mod:`tests.runs.frozen`, and the current names of the fields it reads from run records.

When a setting is renamed, update the overrides. When a field of the run records is renamed, update the value in the mapping
of names. The names in the result files never change.
"""

from __future__ import annotations

from typing import Any

LAYER_FIELDS = {  # frozen name: current name in the layers of a run record
    "rows": "rows",
    "columns": "columns",
    "tokens": "tokens",
    "sparsity": "sparsity",
    "error": "error",
    "relative_range": "relative_range",
    "reordered": "reordered",
    "damping": "damping",
    "rank": "rank",
    "dead_columns": "dead_columns",
    "fallback": "fallback",
    "target": "target",
    "target_error": "target_error",
    "unrefined_error": "unrefined_error",
    "mask_changes": "mask_changes",
    "refinement_rejected": "refinement_rejected",
    "permuted": "permuted",
    "removed": "removed",
    "groups": "groups",
}
LAYER_NAME = "name"
# Other fields of a layer; add new fields here.
NOT_FROZEN = {LAYER_NAME, "seconds", "requested", "hessian_used", "reconstruction"}

LAYER_VALUES: dict[str, dict[Any, Any]] = {  # renamed values of a frozen field, current: frozen
    "target": {"asymmetric": "outputs", "residual": "hidden_states"},
    "fallback": {},
}

STUDY_FIELDS = {  # frozen name: current name in a layer study
    "sparsity": "sparsity",
    "cumulative": "cumulative",
    "worst": "worst",
    "moved": "moved",
    "reorderings": "reorderings",
    "heat": "heat",
    "rows": "rows",
    "columns": "columns",
    "damping": "damping",
}
STUDIES = "figures/*.json"  # in the run folder

TIMED_METRICS = {"images.speedup"}  # not frozen
METRICS: dict[str, str] = {}  # renamed metrics, current: frozen

INPUTS = {  # frozen name: path in a run record
    "calibration": ("protocol", "calibration", "tokens_sha256"),
    "calibration_source": ("protocol", "calibration", "sha256"),
    "calibration_noise": ("protocol", "calibration", "noise_sha256"),
}
PARAMETERS = ("parameters",)  # parameter counts before and after removal
LATENT_ERRORS = ("images", "latent_mse")  # one per step
PACKAGES = ("packages",)
PACKAGE_LAYERS = "layers"

# Configurations: name -> overrides separated by spaces. <data> is the data folder, <gpt2> a model in MODELS.

EVERY = "device=cpu save=true figures.draw=false"
TEXTS = (
    "calibration=local calibration.path=<data>/text/wikitext2_raw_train_first1MB.jsonl calibration.rows=300"
    " calibration.samples=4 calibration.window=128"
    " evaluation=local evaluation.perplexity.local.path=<data>/text/wikitext2_raw_test.jsonl"
    " evaluation.perplexity.local.rows=300 evaluation.perplexity.local.window=128 evaluation.perplexity.local.windows=4"
)
STORIES = "model=local model.path=<data>/models/stories260k-llama"
LANGUAGE_BASE = f"{EVERY} {STORIES} {TEXTS} engine.block_size=16"  # 16: several blocks in the 64 columns of a layer
DIFFUSION_BASE = f"{EVERY} calibration.samples=3 evaluation.images.samples=2 diffusion.steps=3"

ORDERED = "method=rose reorder.threshold=0.3"  # exceeded by some layers and not by others
ZERO_SHOT = "evaluation.zero_shot.data_dir=<data>/zeroshot evaluation.zero_shot.limit=2"
OWN_MODEL = "model.path=<{}>"

LANGUAGE = {
    # Methods
    "dense": "method=dense",
    "magnitude": "method=magnitude",
    "wanda": "method=wanda",
    "sparsegpt": "method=sparsegpt",
    "rose": ORDERED,
    "dsnot": "method=dsnot",
    "dsnot_sparsegpt": "method=dsnot_sparsegpt method.options.max_cycles=20",
    "layer_options": "method=dsnot ++method.layer_options={*o_proj:{max_cycles:0},*layers.1.*:{update_threshold:0.5}}",
    "alps": "method=alps method.options.max_iterations=30 method.options.steps=3",
    "oats": "method=oats method.options.iterations=4",
    "rose_plus": "method=rose_plus reorder.threshold=0.3",
    # Patterns
    "sparsegpt 0.8": "method=sparsegpt sparsity.ratio=0.8",
    "rose 0.3": f"{ORDERED} sparsity.ratio=0.3",
    "rose 0.7": f"{ORDERED} sparsity.ratio=0.7",
    "magnitude 2:4": "method=magnitude sparsity=2:4",
    "wanda 4:8": "method=wanda sparsity=4:8",
    "sparsegpt 2:4": "method=sparsegpt sparsity=2:4",
    "rose 4:8": f"{ORDERED} sparsity=4:8",
    "rose_plus 2:4": "method=rose_plus sparsity=2:4 reorder.threshold=0.3",
    "dsnot 1:4": "method=dsnot sparsity=2:4 sparsity.pattern=1:4",
    "alps 2:4": "method=alps method.options.max_iterations=30 sparsity=2:4",
    "structured": "method=sparsegpt sparsity=structured sparsity.ratio=0.5",
    "structured heads": "method=sparsegpt sparsity=structured sparsity.ratio=0.5 sparsity.neurons=false",
    "structured neurons": "method=sparsegpt sparsity=structured sparsity.ratio=0.25 sparsity.heads=false sparsity.at_once=8",
    "structured exact": "method=sparsegpt sparsity=structured sparsity.ratio=0.5 sparsity.saliency=exact",
    "structured magnitude": "method=magnitude sparsity=structured sparsity.ratio=0.5",
    # Reordering of columns and blocks
    "order always": "method=rose reorder.threshold=null",
    "order ascending": "method=sparsegpt reorder=ascending reorder.threshold=null",
    "order blocks": "method=sparsegpt reorder=block_only reorder.threshold=null",
    "order columns": "method=sparsegpt reorder=column_only reorder.threshold=null",
    "order obs": "method=rose reorder.score=obs reorder.threshold=null",
    "order magnitude": "method=rose reorder.score=magnitude reorder.threshold=null",
    # Refinement, regression targets and sparsity allocation
    "refine least_squares": "method=sparsegpt refine=cg refine.steps=4",
    "refine masks": f"{ORDERED} refine=admm refine.steps=3 refine.mask_iterations=6",
    "refine wanda 2:4": "method=wanda sparsity=2:4 refine=admm refine.steps=2 refine.mask_iterations=4",
    "target half": f"{ORDERED} target=residual",
    "target outputs": "method=sparsegpt target=asymmetric",
    "target refine": "method=wanda target=residual refine=cg refine.steps=3",
    "allocation owl": "method=wanda allocation=owl sparsity.ratio=0.6",
    "allocation losses": f"{ORDERED} allocation=losses",
    # Engine
    "permute": "method=wanda sparsity=2:4 pipeline.permute=true",
    "damping": "method=sparsegpt engine.damping=0.1 engine.block_size=48",
    "damping raised": "method=sparsegpt engine.damping=0 calibration.samples=1 calibration.window=32",
    "backend torch": f"{ORDERED} engine.backend=torch",
    # Pruning block by block
    "true_sequential": f"{ORDERED} pipeline.true_sequential=true",
    "true_sequential target permute": "method=rose_plus sparsity=2:4 pipeline.true_sequential=true refine.steps=2",
    "layers": "method=sparsegpt pipeline.layers=['*.mlp.*','*.3.*'] pipeline.skip=['*.4.*','*.gate_proj']",
    "bfloat16": "method=sparsegpt model.dtype=bfloat16",
    "seed": "method=sparsegpt seed=3 calibration.draw=documents calibration.window=64",
    # Architectures
    "gpt2": f"{ORDERED} target=residual {OWN_MODEL.format('gpt2')}",
    "opt": f"{ORDERED} refine=cg {OWN_MODEL.format('opt')}",  # with dead input channels
    "gemma2": f"{ORDERED} sparsity.ratio=0.6 {OWN_MODEL.format('gemma2')}",
    "gemma2 structured": f"method=sparsegpt sparsity=structured sparsity.ratio=0.5 {OWN_MODEL.format('gemma2')}",
    "experts": f"method=sparsegpt pipeline.expert_tokens=120 {OWN_MODEL.format('mixtral')}",
    "experts magnitude": (
        f"{ORDERED} pipeline.expert_tokens=120 pipeline.starved_experts=magnitude {OWN_MODEL.format('mixtral')}"
    ),
    # Evaluation and figures
    "by_blocks": "method=wanda pipeline.by_blocks=true evaluation.batch=2",
    "zero_shot": f"method=wanda evaluation=[local,zero_shot] {ZERO_SHOT}",
    "zero_shot dense": f"method=dense evaluation=[local,zero_shot] {ZERO_SHOT} evaluation.zero_shot.limit=3 model.bos=none",
    "study": "method=sparsegpt figures.study=['*.1.self_attn.o_proj']",
}

DIFFUSION = {
    "sd3": "model=small-sd3 method=sparsegpt",
    "flux": "model=small-flux method=rose reorder.threshold=0.1 engine.block_size=16",
    "sd": "model=small-sd method=wanda",
    "sdxl": "model=small-sdxl method=sparsegpt sparsity=2:4 diffusion.packages=2",
    "ddpm": "model=small-ddpm method=sparsegpt",
    "sd3 dense": "model=small-sd3 method=dense",
    "sd3 magnitude": "model=small-sd3 method=magnitude",
    "sd3 dsnot": "model=small-sd3 method=dsnot",
    "sd3 order": "model=small-sd3 method=rose reorder.threshold=null engine.block_size=16",
    "sd3 refine": "model=small-sd3 method=sparsegpt refine=admm refine.steps=2 refine.mask_iterations=4",
    "sd3 uniform": "model=small-sd3 method=sparsegpt diffusion.weighting=uniform diffusion.packages=1",
    "sd3 linear_increase": "model=small-sd3 method=sparsegpt diffusion.weighting=linear_increase diffusion.alpha_max=9",
    "sd3 skip": "model=small-sd3 method=sparsegpt pipeline.skip=['transformer_blocks.0.*'] seed=2",
    "sd3 structured": "model=small-sd3 method=sparsegpt sparsity=structured sparsity.ratio=0.4",
    "sd3 structured exact": "model=small-sd3 method=sparsegpt sparsity=structured sparsity.ratio=0.4 sparsity.saliency=exact",
    "flux structured": "model=small-flux method=sparsegpt sparsity=structured sparsity.ratio=0.5",
    "sd structured": "model=small-sd method=magnitude sparsity=structured sparsity.ratio=0.5",
    "sd scheduler": "model=small-sd method=sparsegpt diffusion.scheduler=EulerDiscreteScheduler diffusion.guidance=2",
    "ddpm heads": "model=small-ddpm method=sparsegpt sparsity=structured sparsity.ratio=0.5 sparsity.neurons=false",
}

# Alternative ways to obtain the result of a configuration above: its name, extra overrides, and how it is run.
SAME: dict[str, tuple[str, str, str]] = {
    "rose, activations on disk": ("rose", "pipeline.activations=disk", "run"),
    "rose, weights on disk": ("rose", "pipeline.weights=disk", "run"),
    "target half, on disk": ("target half", "pipeline.weights=disk pipeline.activations=disk", "run"),
    "rose, crashed": ("rose", "", "crash 2"),
    "rose, stopped": ("rose", "", "stop 14"),
    "rose, stopped, recomputed": ("rose", "pipeline.resume=recompute", "stop 14"),
    "rose, stopped, weights on disk": ("rose", "pipeline.weights=disk", "stop 14"),
    "rose_plus, stopped": ("rose_plus", "", "stop 26"),
    "rose_plus 2:4, crashed": ("rose_plus 2:4", "", "crash 2"),
    "structured, crashed": ("structured", "", "crash 2"),
    "sd3, crashed": ("sd3", "", "crash 2"),
    "sd3 structured, crashed": ("sd3 structured", "", "crash 2"),
    "rose, in a sweep": ("rose", "sparsity.ratio=0.9,0.5", "sweep"),
}

RANKS = {  # two processes
    "ranks": ORDERED,
    "ranks rose_plus": "method=rose_plus reorder.threshold=0.3",
}

NAMES = (*LANGUAGE, *DIFFUSION, *RANKS, *SAME)

MODELS = {  # models with random weights: configuration class and arguments
    "gpt2": ("GPT2Config", {"vocab_size": 512, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": 512,
            "hidden_size": 48,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 48,
            "max_position_embeddings": 256,
        },
    ),
    "gemma2": (
        "Gemma2Config",
        {
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "sliding_window": 48,
        },
    ),
    "mixtral": (
        "MixtralConfig",
        {
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
        },
    ),
}
