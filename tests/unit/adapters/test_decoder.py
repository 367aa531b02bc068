"""Adapters on the autoencoder's decoder: known by their content, beside those on the DiT, each with its strength."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from helpers.golden import GOLDEN
from sa3train.adapters.adapter import DECODER, Adapter
from sa3train.adapters.apply.load_report import check_fit
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.adapters.layer_filter import find_adaptable_layers
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.adapters.tools import Truncation, convert_adapter, inspect_adapter, merge_adapters
from sa3train.core.errors import AdapterError
from sa3train.inference import Generator
from sa3train.models.checkpoint import load_checkpoint

PLAIN = GOLDEN / "plain"
LORA = PLAIN / "adapters" / "lora.safetensors"
BARE = "layers.3.transformers.0.self_attn.to_qkv"
SETTINGS: dict[str, Any] = {"prompt": "low hum", "duration": 0.4, "steps": 2, "seed": 4, "cfg_scale": 1.0}


@pytest.fixture(scope="module")
def model() -> Any:
    return load_checkpoint(PLAIN)


@pytest.fixture(scope="module")
def adapter(model: Any) -> Adapter:
    """A lora on every layer of the decoder, trained a little."""
    injected = inject(model.get_adapter_root("decoder"), AdapterSpec("lora", rank=2))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in injected.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.1)
    made = injected.export({"base_hash": model.autoencoder_fingerprint()})
    injected.remove()
    return made


def test_a_file_is_named_as_the_published_one_and_read_again(adapter: Adapter, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a.safetensors", adapter, dtype=None)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert f"{BARE}.parametrizations.weight.0.lora_A" in file.keys()  # noqa: SIM118 (not a dict)
        assert json.loads(file.metadata()["lora_config"])["target"] == "decoder"
    read = load_adapter(tmp_path / "a.safetensors")
    assert read.part == "decoder"
    assert read.fingerprint == adapter.fingerprint


NATIVE, PEFT, COMFY = (
    (".parametrizations.weight.0.lora_A", ".parametrizations.weight.0.lora_B"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
)


@pytest.mark.parametrize("ends", [NATIVE, PEFT, COMFY])
@pytest.mark.parametrize(
    "root",
    ["", "decoder.", "model.decoder.", "autoencoder.decoder.", "pretransform.model.decoder.",
     "model.pretransform.model.decoder.", "first_stage_model.decoder.", "vae.decoder."],
)  # fmt: skip
def test_every_root_is_the_decoder(root: str, ends: tuple[str, str], tmp_path: Path) -> None:
    layers = {BARE: (6, 4), "layers.1": (4, 4)}
    stored = {}
    for layer, (rows, cols) in layers.items():
        stored |= {f"{root}{layer}{ends[0]}": torch.ones(2, cols), f"{root}{layer}{ends[1]}": torch.ones(rows, 2)}
    save_file(stored, tmp_path / "a.safetensors")
    assert set(load_adapter(tmp_path / "a.safetensors").tensors) == {f"{DECODER}{layer}" for layer in layers}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["layers.0.transformers.0.self_attn.to_qkv"], "encoder"),
        (["pretransform.model.encoder.layers.2"], "encoder"),
        (["autoencoder.bottleneck.layers.1"], "encoder or bottleneck"),
        ([BARE, "transformer.layers.0.self_attn.to_qkv"], "two parts of the model"),
    ],
)
def test_other_parts_are_refused(layers: list[str], message: str, tmp_path: Path) -> None:
    save_file({f"{layer}{end}": torch.ones(2, 2) for layer in layers for end in PEFT}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path / "a.safetensors")


def test_the_generator_puts_it_beside_one_on_the_dit(model: Any, adapter: Adapter) -> None:
    generator = Generator(model)
    plain = generator.generate(**SETTINGS, return_latents=True)
    report = generator.load_adapter(adapter, 0.5)
    assert (report.part, len(report.matched), report.warnings) == ("decoder", len(adapter.tensors), [])
    assert "on the autoencoder's decoder" in report.summary
    assert set(report.effect) == {"all", "autoencoder's decoder"}
    rendered = generator.generate(**SETTINGS, return_latents=True)
    assert torch.equal(rendered.latents, plain.latents)
    assert not torch.equal(rendered.audio[0], plain.audio[0])
    generator.load_adapter(LORA)
    both = generator.generate(**SETTINGS, return_latents=True)
    assert not torch.equal(both.latents, plain.latents)
    generator.set_strength(0.0, adapter=1)
    assert torch.equal(generator.generate(**SETTINGS).audio[0], rendered.audio[0])
    generator.set_strength(0.0)
    assert torch.equal(generator.generate(**SETTINGS).audio[0], plain.audio[0])
    generator.stack.clear()


def test_it_acts_where_nothing_is_sampled(model: Any, adapter: Adapter) -> None:
    """init_noise_level=0 decodes the encoded input itself."""
    generator = Generator(model)
    source = (44100, torch.randn(2, 20000, generator=torch.Generator().manual_seed(0)) * 0.1)
    settings = SETTINGS | {"init_audio": source, "init_noise_level": 0.0}
    plain = generator.generate(**settings).audio[0]
    generator.load_adapter(adapter)
    assert not torch.equal(generator.generate(**settings).audio[0], plain)
    generator.stack.clear()


def test_an_interval_and_a_changing_strength_are_refused(model: Any, adapter: Adapter) -> None:
    with pytest.raises(AdapterError, match="interval.*no effect"):
        Generator(model).load_adapter(adapter, interval=(0.0, 0.5))
    with pytest.raises(AdapterError, match="cannot change from 0.2 to 1"):
        Generator(model).load_adapter(adapter, strength=(0.2, 1.0))


def test_the_tools_know_it(model: Any, adapter: Adapter, tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    save_adapter(source, adapter)
    without = load_checkpoint(PLAIN, parts=("dit", "conditioner"))  # the decoder is loaded for it
    report = inspect_adapter(source, without).load_report
    assert report is not None and report.part == "decoder" and not report.is_partial
    convert_adapter(source, tmp_path / "peft", model=without)
    assert load_adapter(tmp_path / "peft").tensors.keys() == adapter.tensors.keys()
    with pytest.raises(AdapterError, match="ComfyUI cannot patch"):
        convert_adapter(source, tmp_path / "comfy.safetensors", to="comfy")
    with pytest.raises(AdapterError, match="two parts"):
        merge_adapters([(source, 1.0), (LORA, 1.0)], tmp_path / "m.safetensors", without, Truncation(rank=2))
    merge_adapters([(source, 1.0), (LORA, 0.5)], tmp_path / "merged", without)
    merged, generator = Generator.from_pretrained(tmp_path / "merged", "cpu"), Generator(model)
    generator.load_adapter(source)
    generator.load_adapter(LORA, 0.5)
    expected, found = generator.generate(**SETTINGS).audio[0], merged.generate(**SETTINGS).audio[0]
    generator.stack.clear()
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)  # the adapter files are fp16


def test_the_published_file_s_layers_are_those_of_same_l() -> None:
    """98 tensors of rank 16 on the 49 linear layers of SAME-L's decoder, named from the decoder on."""
    manifest = json.loads((GOLDEN / "state_dict_manifests.json").read_text())["medium"]
    weights = {name: shape for name, shape in manifest.items() if DECODER in name and name.endswith(".weight")}
    linear = {name.partition(DECODER)[2].removesuffix(".weight") for name, shape in weights.items() if len(shape) == 2}
    assert 2 * len(linear) == 98
    tensors = {f"{DECODER}{layer}": {"lora_A": torch.ones(1, 1)} for layer in linear}
    assert Adapter(AdapterSpec("lora"), tensors).part == "decoder"
    assert BARE in linear and "layers.1" in linear


def test_one_of_another_autoencoder_is_refused(model: Any, adapter: Adapter) -> None:
    layers = find_adaptable_layers(load_checkpoint("nano", parts=("autoencoder",)).get_adapter_root("decoder"))
    with pytest.raises(AdapterError, match="another architecture"):
        check_fit(adapter, layers)
