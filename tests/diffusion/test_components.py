"""Loading of pipelines: incomplete pipelines raise an error that names the missing parts."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rose_exp.diffusion.loading import load_pipeline
from rose_exp.diffusion.small import small_pipeline
from rose_exp.runtime.errors import RoseExpError
from rose_exp.settings.schema import ModelSettings

PARTS = {
    "sd3": ["transformer", "vae", "text_encoder", "text_encoder_3"],
    "sd": ["unet", "vae", "text_encoder"],
    "ddpm": ["unet"],
}
CASES = [(kind, part) for kind, parts in PARTS.items() for part in parts]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    for kind in PARTS:
        small_pipeline(kind).save_pretrained(folder / kind)
    return folder


@pytest.fixture
def changed(pipelines, tmp_path):
    def change(kind, part, tensors):
        folder = tmp_path / kind
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pipelines / kind, folder)
        (file,) = (folder / part).glob("*.safetensors")
        save_file(tensors(load_file(file)), file, {"format": "pt"})
        return ModelSettings(kind="diffusion", path=str(folder))

    return change


@pytest.mark.parametrize("kind", PARTS)
def test_saved_pipeline_loads_with_equal_weights(kind, pipelines):
    found, facts = load_pipeline(ModelSettings(kind="diffusion", path=str(pipelines / kind)))
    expected = small_pipeline(kind)
    for name, part in expected.components.items():
        if isinstance(part, torch.nn.Module):
            own = getattr(found, name).state_dict()
            assert all(torch.equal(value, own[key]) for key, value in part.state_dict().items()), name
    assert "unused_weights" not in facts


@pytest.mark.parametrize(("kind", "part"), CASES)
def test_missing_tensors_are_named(kind, part, changed):
    names = sorted(load_file(next(iter(_files(changed, kind, part)))))
    for name in names[:: 1 + len(names) // 3]:
        with pytest.raises(RoseExpError, match=rf"{part} do not match its configuration: .* is missing") as error:
            load_pipeline(changed(kind, part, lambda found, name=name: {k: v for k, v in found.items() if k != name}))
        assert name.rpartition(".")[0] in str(error.value)
        assert "\n" not in str(error.value)


def _files(changed, kind, part):
    from pathlib import Path

    return Path(changed(kind, part, lambda found: found).path, part).glob("*.safetensors")


@pytest.mark.parametrize(("kind", "part"), CASES)
def test_non_finite_weights_are_named(kind, part, changed):
    def damage(found):
        name = next(name for name, value in found.items() if value.is_floating_point())
        found[name].view(-1)[0] = torch.nan
        return found

    with pytest.raises(RoseExpError, match=f"{part}: expected finite weights, got NaN or infinity in "):
        load_pipeline(changed(kind, part, damage))


def test_unused_tensors_raise_in_the_denoiser_and_are_recorded_elsewhere(changed):
    def more(found):
        return found | {"unknown.weight": torch.ones(3)}

    with pytest.raises(RoseExpError, match="unknown.weight is unexpected"):
        load_pipeline(changed("sd3", "transformer", more))
    _, facts = load_pipeline(changed("sd3", "vae", more))
    assert facts["unused_weights"] == ["vae: unknown.weight"]


def test_missing_components_and_index_paths_outside_the_folder_are_named(changed, tmp_path):
    settings = changed("sd3", "vae", lambda found: found)
    folder = tmp_path / "sd3"
    shutil.move(folder / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "elsewhere.safetensors")
    names = list(load_file(tmp_path / "elsewhere.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../../elsewhere.safetensors")}
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RoseExpError, match=r"expected names of files in the folder of .*, got '../../elsewhere.safetensors'"):
        load_pipeline(settings)
    shutil.rmtree(folder / "vae")
    with pytest.raises(RoseExpError, match="expected a folder vae in"):
        load_pipeline(settings)
