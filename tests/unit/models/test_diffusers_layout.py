"""A model in the layout of diffusers is the same model; what is missing, unknown or of another model is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.golden import GOLDEN
from sa3train.adapters.tools.merge_checkpoint import merge_into_checkpoint
from sa3train.core.errors import CheckpointError
from sa3train.models.checkpoint import StableAudio3, load_autoencoder, load_checkpoint
from sa3train.models.diffusers_layout import _FIXED, COMPONENTS, convert_name, revert_name

DIFF = GOLDEN / "diff"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "pipeline"
    merge_into_checkpoint(load_checkpoint(DIFF), folder, [], to="diffusers")
    return folder


@pytest.fixture
def pipeline(written: Path, tmp_path: Path) -> Path:
    """A folder as diffusers itself writes it, which a test may damage."""
    folder = tmp_path / "pipeline"
    shutil.copytree(written, folder)
    (folder / "model_config.json").unlink()
    return folder


def change_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_equal(one: StableAudio3, other: StableAudio3) -> None:
    for part in ("dit", "conditioner", "autoencoder"):
        first, second = (getattr(model, part).state_dict() for model in (one, other))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), part
    assert one.fingerprint() == other.fingerprint()
    assert one.autoencoder_fingerprint() == other.autoencoder_fingerprint()
    prompts = [model.conditioner(["a dog"], [3.0]).cross_attn_cond_BLD for model in (one, other)]
    assert torch.equal(*prompts)


def test_the_layout_and_the_way_back_keep_the_model(written: Path, tmp_path: Path) -> None:
    source, read = load_checkpoint(DIFF), load_checkpoint(written)
    assert_equal(source, read)
    assert read.config == source.config
    assert load_autoencoder(written).file_fingerprint() == source.autoencoder_fingerprint()
    merge_into_checkpoint(read, tmp_path / "released", [], to="released")
    back = load_checkpoint(tmp_path / "released")
    assert_equal(source, back)
    assert back.config == source.config


def test_what_diffusers_does_not_store_is_as_in_the_released_medium(pipeline: Path) -> None:
    read, source = load_checkpoint(pipeline), load_checkpoint(DIFF)
    assert_equal(source, read)
    assert read.config.sample_size == 16_777_216
    assert read.config.chunked
    assert (read.config.autoencoder, read.config.dit) == (source.config.autoencoder, source.config.dit)
    assert (read.config.conditioner, read.objective) == (source.config.conditioner, "rectified_flow")
    change_json(pipeline / "scheduler" / "scheduler_config.json", stochastic_sampling=True)
    assert load_checkpoint(pipeline, parts=()).objective == "rf_denoiser"


def test_sharded_files_and_a_variant_are_read(pipeline: Path) -> None:
    state = load_file(pipeline / "transformer" / WEIGHTS)
    (pipeline / "transformer" / WEIGHTS).unlink()
    shards = {f"shard-{part}.safetensors": sorted(state)[part::2] for part in range(2)}
    for file, names in shards.items():
        save_file({name: state[name] for name in names}, pipeline / "transformer" / file)
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (pipeline / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (pipeline / "vae" / WEIGHTS).rename(pipeline / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert_equal(load_checkpoint(DIFF), load_checkpoint(pipeline))


def test_every_name_has_its_own_in_the_other_layout() -> None:
    names = [name for name in load_checkpoint(DIFF, parts=()).weights.tensors if "rope." not in name]
    converted = {convert_name(name): name for name in names if not name.endswith("noise_scaling_factor")}
    assert None not in converted
    assert len(converted) == len(names) - 1
    assert all(revert_name(*pair) == name for pair, name in converted.items() if pair)
    assert revert_name("transformer", "pos_embed.weight") is None


def remove(*parts: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        target = folder.joinpath(*parts)
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return damage


def set_json(*parts: str, **changes: object) -> Callable[[Path], None]:
    return lambda folder: change_json(folder.joinpath(*parts), **changes)


def rewrite(component: str, name: str, value: torch.Tensor) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / component / WEIGHTS)
        save_file(state | {name: value}, folder / component / WEIGHTS)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("vae"), "no vae: diffusers has no autoencoder of SAME-S's kind"),
        (remove("transformer", WEIGHTS), f"transformer has no {WEIGHTS}"),
        (remove("scheduler"), "scheduler_config.json is missing"),
        (remove("text_encoder"), "the text encoder is not in"),
        (set_json("model_index.json", _class_name="StableAudioPipeline"), "holds a StableAudioPipeline of diffusers"),
        (set_json("transformer", "config.json", patch_size=2), "patch_size is 2, where 1 is expected"),
        (set_json("transformer", "config.json", depth=3), "21 missing: model.model.transformer.layers.2"),
        (set_json("vae", "config.json", encoder_c_mults=[1, 2]), "one stage is expected"),
        (set_json("vae", "config.json", _class_name="AutoencoderKL"), "_class_name is 'AutoencoderKL'"),
        (rewrite("transformer", "controlnet.weight", torch.ones(1)), "1 unexpected: transformer/controlnet.weight"),
        (rewrite("duration_embedder", "freqs", torch.ones(128)), "freqs are other frequencies"),
    ],
)
def test_another_model_is_refused(pipeline: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(pipeline)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(pipeline).conditioner(["a dog"], [3.0])


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_missing_setting_is_refused(pipeline: Path, component: str) -> None:
    file = pipeline / component / "config.json"
    content = json.loads(file.read_text())
    for key in {"_class_name", *_FIXED[component], {"duration_embedder": "output_dim"}.get(component, "_class_name")}:
        file.write_text(json.dumps({name: value for name, value in content.items() if name != key}))
        with pytest.raises(CheckpointError, match=rf"{key} is missing\. Save the pipeline again with diffusers\.$"):
            load_checkpoint(pipeline, parts=())


def test_unknown_settings_are_reported(pipeline: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_json(pipeline / "vae" / "config.json", encoder_chunk_size=32, new_setting=1)
    load_checkpoint(pipeline, parts=())
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["new_setting"]
