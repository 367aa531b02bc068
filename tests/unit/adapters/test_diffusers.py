"""Adapters and models written for diffusers compute there what they compute here, by its own pipeline and PEFT."""

import copy
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.generation import generate_latents
from helpers.golden import GOLDEN
from sa3train.adapters.adapter import Adapter
from sa3train.adapters.formats.diffusers import write_diffusers_folder
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.adapters.formats.native import build_spec
from sa3train.adapters.tools import convert_adapter, merge_adapters
from sa3train.core.errors import AdapterError
from sa3train.inference import Generator
from sa3train.models.checkpoint import load_checkpoint

LIMIT = 1e-4
DURATION = 3.1  # of which the generation, with its 6 s more, has no padding
SEED = 7
ARCHES = ("plain", "diff")
CONFIG = "adapter_config.json"


def golden(arch: str, kind: str) -> Path:
    return GOLDEN / arch / "adapters" / f"{kind}.safetensors"


def pick(adapter: Adapter, *ends: str) -> Adapter:
    """Only some layers, each with an alpha of its own; the fewer, the louder."""
    paths = [path for path in adapter.tensors if path.endswith(ends)]
    alphas = {path: index + 120 / len(paths) ** 3 for index, path in enumerate(paths)}
    spec = build_spec(adapter.spec.adapter_type, dict.fromkeys(paths, 4), alpha=1.0, alpha_pattern=alphas)
    return replace(adapter, spec=spec, tensors={path: adapter.tensors[path] for path in paths}, metadata={})


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """diffusers' pipeline of each model with an adapter in its weights, and its folder."""
    from diffusers import AutoencoderSAME, StableAudio3Pipeline

    found = {}
    for arch in ARCHES:
        folder = tmp_path_factory.mktemp(arch) / "pipeline"
        source = GOLDEN / arch
        if arch == "diff":  # as a post-trained model, which is sampled with noise in every step
            source = shutil.copytree(source, folder.parent / "post", copy_function=shutil.copyfile)
            config = (source / "model_config.json").read_text()
            (source / "model_config.json").write_text(config.replace("rectified_flow", "rf_denoiser"))
        model = load_checkpoint(source, parts=("dit", "conditioner"))
        result = merge_adapters([(golden(arch, "dora-rows"), 0.7)], folder, model, to="diffusers")
        assert [warning.count("attends in chunks") for warning in result.warnings if "not carried" in warning] == [
            1
        ] * (arch == "plain")
        own = AutoencoderSAME(encoder_channels=64, encoder_c_mults=[1], encoder_transformer_depths=[1], latent_dim=64)
        found[arch] = StableAudio3Pipeline.from_pretrained(folder, **({"vae": own} if arch == "plain" else {})), folder
        found[arch][0].set_progress_bar_config(disable=True)
    return found


@contextmanager
def supply_local_condition(pipe: Any) -> Iterator[None]:
    """Give the transformer the zeros that the released code gives it."""

    def add(_: Any, args: tuple[Tensor, ...], keywords: dict[str, Any]) -> Any:
        return args, keywords | {"local_add_cond": torch.zeros(1, 65, args[0].shape[2])}

    handle = pipe.transformer.register_forward_pre_hook(add, with_kwargs=True)
    yield
    handle.remove()


def run_pipeline(pipe: Any, frames: int) -> Tensor:
    rng = torch.Generator().manual_seed(SEED)
    noise = torch.randn(1, 64, frames, generator=rng)
    settings = {"num_inference_steps": 4, "output_type": "latent", "latents": noise, "generator": rng}
    with supply_local_condition(pipe):
        latents: Tensor = pipe("a dog", duration=DURATION, **settings).audios
    return latents


def generate(generator: Generator) -> Tensor:
    return generate_latents(generator, "a dog", duration=DURATION, seed=SEED, steps=4, cfg_scale=1.0)


def load_base(arch: str, folder: Path) -> Generator:
    """The model whose weights the pipeline has: its own folder, or the same merge in the released layout."""
    if arch == "diff":
        return Generator.from_pretrained(folder, "cpu", "fp32")
    target = folder.parent / "released"
    if not target.exists():
        model = load_checkpoint(GOLDEN / arch, parts=("dit", "conditioner"))
        merge_adapters([(golden(arch, "dora-rows"), 0.7)], target, model)
    return Generator.from_pretrained(target, "cpu", "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "lora", "dora-rows", "few layers", "duration alone"])
@pytest.mark.parametrize("arch", ARCHES)
def test_diffusers_generates_the_same(
    pipelines: dict[str, tuple[Any, Path]], arch: str, kind: str | None, tmp_path: Path
) -> None:
    from peft import PeftModel

    pipe, folder = pipelines[arch]
    generator = load_base(arch, folder)
    bare = generate(generator)
    if kind is None:
        assert (run_pipeline(pipe, bare.shape[2]) - bare).abs().max() < LIMIT
        return
    ends = {"few layers": ("project_in", "0.ff.ff.2", "1.self_attn.to_qkv"), "duration alone": ("embedding.1",)}
    adapter = load_adapter(golden(arch, kind if kind not in ends else "lora"))
    adapter = pick(adapter, *ends[kind]) if kind in ends else adapter
    write_diffusers_folder(tmp_path / "adapter", adapter, None)
    generator.load_adapter(adapter, allow_partial=True)
    ours = generate(generator)
    assert (ours - bare).abs().max() > 100 * LIMIT
    adapted = copy.copy(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of tensors that are missing or left over
        if (tmp_path / "adapter" / CONFIG).is_file():
            transformer = copy.deepcopy(pipe.transformer)
            adapted.transformer = PeftModel.from_pretrained(transformer, tmp_path / "adapter")
        if (tmp_path / "adapter" / "duration_embedder").is_dir():
            embedder = copy.deepcopy(pipe.duration_embedder)
            name = "duration_embedder"
            adapted.duration_embedder = PeftModel.from_pretrained(embedder, tmp_path / "adapter", subfolder=name)
    assert (run_pipeline(adapted, bare.shape[2]) - ours).abs().max() < LIMIT


@pytest.mark.slow
def test_the_autoencoder_is_the_same(pipelines: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    pipe, folder = pipelines["diff"]
    (tmp_path / "silent").mkdir()
    for part in folder.iterdir():
        (tmp_path / "silent" / part.name).symlink_to(part)
    config = json.loads((folder / "model_config.json").read_text())
    same = config["model"]["pretransform"]["config"]
    for part in ("encoder", "decoder"):
        same[part]["config"]["mask_noise"] = 0.0  # which diffusers leaves out
    same["bottleneck"]["config"]["noise_regularize"] = False
    (tmp_path / "silent" / "model_config.json").unlink()
    (tmp_path / "silent" / "model_config.json").write_text(json.dumps(config))
    ours = load_checkpoint(tmp_path / "silent", parts=("autoencoder",)).autoencoder
    audio = 0.3 * torch.randn(1, 2, 6 * 4096, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = ours.encode(audio)
        assert (pipe.vae.encode(audio).latents - latents).abs().max() < LIMIT
        assert (pipe.vae.decode(latents).sample - ours.decode(latents)).abs().max() < LIMIT


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("kind", ["lora", "dora-rows"])
def test_the_way_back_is_exact(arch: str, kind: str, tmp_path: Path) -> None:
    convert_adapter(golden(arch, kind), tmp_path / "out", "diffusers")
    before, after = load_adapter(golden(arch, kind)), load_adapter(tmp_path / "out")
    assert (after.spec, after.tensors.keys()) == (before.spec, before.tensors.keys())
    for path, params in before.tensors.items():
        assert all(torch.equal(tensor, after.tensors[path][name]) for name, tensor in params.items()), path
    transformer = load_file(tmp_path / "out" / "adapter_model.safetensors")
    conv = "base_model.model.preprocess_conv."
    assert transformer[f"{conv}lora_A.weight"].ndim == 3
    if kind == "dora-rows":
        assert transformer[f"{conv}lora_magnitude_vector.weight"].shape == (1, 64, 1)
    alone = load_adapter(tmp_path / "out" / "duration_embedder")
    assert list(alone.tensors) == ["conditioners.seconds_total.embedder.embedding.1"]


def test_a_file_named_as_diffusers_pipelines_save_them_is_read(tmp_path: Path) -> None:
    source = load_adapter(golden("diff", "lora"))
    convert_adapter(golden("diff", "lora"), tmp_path / "out", "diffusers")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "out" / CONFIG).read_text())
    metadata = {f"transformer.{name}": settings[name] for name in ("r", "lora_alpha", "rank_pattern")}
    renamed = {key.replace("base_model.model.", "transformer."): tensor for key, tensor in stored.items()}
    save_file(renamed, tmp_path / "one.safetensors", {"lora_adapter_metadata": json.dumps(metadata)})
    read = load_adapter(tmp_path / "one.safetensors")
    for path, params in read.tensors.items():
        assert all(torch.equal(tensor, source.tensors[path][name]) for name, tensor in params.items()), path
    assert len(read.tensors) == len(source.tensors) - 1, "without the duration embedder"


def test_what_cannot_be_carried_is_refused(tmp_path: Path) -> None:
    for kind in ("dora-cols", "bora"):
        with pytest.raises(AdapterError, match=f"diffusers has no {kind}.*model=NAME"):
            convert_adapter(golden("diff", kind), tmp_path / "out", "diffusers")
    base = load_checkpoint(GOLDEN / "diff", parts=("dit", "conditioner"))
    expanded = convert_adapter(golden("diff", "lora-xs"), tmp_path / "xs", "diffusers", base, dtype="fp32")
    assert expanded.error.relative < 1e-5
    lora = load_adapter(golden("diff", "lora"))
    with pytest.raises(AdapterError, match="no layer of diffusers' transformer"):
        write_diffusers_folder(
            tmp_path / "out", replace(lora, tensors={"model.other": next(iter(lora.tensors.values()))})
        )
    with pytest.raises(AdapterError, match="does not suit to=diffusers"):
        convert_adapter(golden("diff", "lora"), tmp_path / "a.safetensors", "diffusers")
    assert not (tmp_path / "out").exists()
    convert_adapter(golden("diff", "lora"), tmp_path / "mixed", "diffusers")
    settings = tmp_path / "mixed" / "duration_embedder" / CONFIG
    whole = json.loads(settings.read_text())
    for changed, message in (
        ({"use_rslora": True}, "another rslora"),
        ({"alpha_pattern": [1]}, "must be a mapping"),
        ({"bias": "all"}, "trains biases"),
    ):
        settings.write_text(json.dumps(whole | changed))
        with pytest.raises(AdapterError, match=message):
            load_adapter(tmp_path / "mixed")
    settings.write_text(json.dumps(whole))
    for file in (settings, tmp_path / "mixed" / CONFIG):
        content = file.read_text()
        file.unlink()
        with pytest.raises(AdapterError, match=f"(?s){CONFIG}.*No such file|{CONFIG}.*missing"):
            load_adapter(tmp_path / "mixed")
        file.write_text(content)


def test_other_methods_of_peft_under_diffusers_names_are_refused_where_rows_would_move(tmp_path: Path) -> None:
    name = "model.transformer.layers.0.self_attn.to_qkv"
    from sa3train.adapters.spec import AdapterSpec

    tensors = {name: {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(192, 64)}}
    save_adapter(tmp_path / "lokr", Adapter(AdapterSpec("lokr", rank=4), tensors), None)
    file = tmp_path / "lokr" / "adapter_model.safetensors"
    renamed = {
        key.replace(name, "transformer_blocks.0.self_attn.to_qkv"): value for key, value in load_file(file).items()
    }
    save_file(renamed, file)
    with pytest.raises(AdapterError, match="only the rows of a LoRA or DoRA"):
        load_adapter(tmp_path / "lokr")


@pytest.mark.parametrize(
    ("sources", "settings", "message"),
    [
        ([], {}, "nothing to merge"),
        ([], {"to": "diffusers"}, "Set model=NAME"),
        (["lora"], {"to": "diffusers", "truncation": 4}, "to= are for checkpoints"),
    ],
)
def test_settings_of_merge_that_do_not_go_together(
    sources: list[str], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    from sa3train.adapters.tools import Truncation

    if "truncation" in settings:
        settings = settings | {"truncation": Truncation(settings["truncation"])}
    with pytest.raises(AdapterError, match=message):
        merge_adapters([(golden("diff", kind), 1.0) for kind in sources], tmp_path / "out", **settings)
