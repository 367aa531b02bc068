"""Files of sa3.cpp: names and scales as its own tools have them, every type there and back, and bad files refused."""

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter

from helpers.golden import PACKED, PLAIN
from sa3train.adapters.adapter import DECODER, Adapter
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.adapters.formats.sa3cpp import fit_to_sa3cpp, get_stem, write_gguf
from sa3train.adapters.layer_filter import find_adaptable_layers
from sa3train.adapters.spec import KINDS, AdapterSpec
from sa3train.adapters.tools.convert import convert_adapter
from sa3train.adapters.tools.measure import measure_difference
from sa3train.core.errors import AdapterError, ConfigError, SA3Error
from sa3train.models.checkpoint import StableAudio3, load_checkpoint

RECORDED = PACKED / "sa3cpp"
"""Two layers of the DiT and one of the conditioner, and what sa3.cpp's own sa3-lora-convert (79f57b8) makes of them."""


@pytest.fixture(scope="module")
def model() -> StableAudio3:
    return load_checkpoint(PLAIN, parts=("dit", "conditioner"))


def make(**settings: Any) -> Adapter:
    torch.manual_seed(0)
    spec = AdapterSpec("dora-rows", **settings)
    paths = ("model.preprocess_conv", "model.transformer.layers.0.self_attn.to_qkv")
    shapes = {path: KINDS["dora-rows"].shapes(64, 64, spec.get_rank(path)) for path in paths}
    tensors = {path: {name: torch.rand(shape) for name, shape in found.items()} for path, found in shapes.items()}
    return Adapter(spec, tensors, {"prompts": '["solo koto"]', "base_model": "nano"}, "made")


def write_raw(path: Path, fields: dict[str, Any], tensors: dict[str, torch.Tensor], kind: str = "sa3-lora") -> Path:
    writer = GGUFWriter(str(path), kind)
    for key, value in fields.items():
        writer.add_key_value(key, value, writer_type(value))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def writer_type(value: Any) -> Any:
    from gguf import GGUFValueType

    return {str: GGUFValueType.STRING, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}[type(value)]


def test_a_file_of_sa3cpp_is_read_as_what_it_was_made_from() -> None:
    converted, original = (load_adapter(RECORDED / f"bora-xs.{suffix}") for suffix in ("gguf", "safetensors"))
    assert converted.tensors.keys() == {path for path in original.tensors if get_stem(path)}
    for path, params in converted.tensors.items():
        assert params.keys() == original.tensors[path].keys()
        assert all(torch.equal(tensor, original.tensors[path][name].float()) for name, tensor in params.items())
    assert (converted.spec.adapter_type, converted.spec.rank, converted.spec.alpha) == ("bora-xs", 2, 3.0)


def test_every_layer_of_the_dit_has_a_name_in_sa3cpp(model: StableAudio3) -> None:
    layers = find_adaptable_layers(model.get_adapter_root())
    assert [path for path in layers if get_stem(path) is None] == ["conditioners.seconds_total.embedder.embedding.1"]
    assert get_stem("model.transformer.layers.11.ff.ff.2") == "dit.11.ff.out"


@pytest.mark.parametrize("name", ["a.gguf", "a.safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_type_makes_the_same_change_there(kind: str, name: str, model: StableAudio3, tmp_path: Path) -> None:
    source, to = PLAIN / "adapters" / f"{kind}.safetensors", "sa3cpp" if name.endswith("safetensors") else None
    result = convert_adapter(source, tmp_path / name, to, model, dtype="fp32")
    assert result.error.relative < 1e-5
    left = any(get_stem(path) is None for path in load_adapter(source).tensors)
    assert ("seconds_total" in "".join(result.warnings)) == left


def test_ranks_and_scales_that_differ_become_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rank": 4, "alpha": 6.0, "rslora": True, "rank_pattern": {"conv": 7}}
    adapter = make(**settings, alpha_pattern={"conv": 2.0})
    fitted, left = fit_to_sa3cpp(adapter)
    write_gguf(tmp_path / "a.gguf", fitted)
    weights = {path: torch.randn(64, 64) for path in adapter.tensors}
    back = load_adapter(tmp_path / "a.gguf")
    assert (left, back.spec.rank, dict(back.spec.rank_pattern)) == ([], 7, {})
    assert measure_difference(adapter, back, weights).relative < 1e-6
    assert back.prompts == ["solo koto"]


@pytest.mark.parametrize(
    ("dtype", "kinds", "bound"),
    [
        ("fp32", {"F32"}, 1e-6),
        ("fp16", {"F16", "F32"}, 1e-3),
        ("bf16", {"BF16", "F32"}, 1e-2),
        ("q8_0", {"Q8_0", "F16", "F32"}, 2e-2),
    ],
)
def test_each_dtype_is_written_and_read(dtype: str, kinds: set[str], bound: float, tmp_path: Path) -> None:
    adapter = make(rank=16)
    write_gguf(tmp_path / "a.gguf", adapter, dtype)
    assert {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "a.gguf").tensors} == kinds
    weights = {path: torch.randn(64, 64) for path in adapter.tensors}
    assert measure_difference(adapter, load_adapter(tmp_path / "a.gguf"), weights).relative < bound


def test_the_json_beside_has_what_sa3cpp_reads(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", make(rank=4, alpha=6.0))
    convert_adapter(tmp_path / "a.gguf", tmp_path / "b.safetensors", "sa3cpp")
    written = json.loads((tmp_path / "b.json").read_text())
    assert {name: written[name] for name in ("adapter_type", "rank", "alpha", "dice")} == {
        "adapter_type": "dora-rows",
        "rank": 4,
        "alpha": 6.0,
        "dice": {"generic": ["solo koto"]},
    }
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(SA3Error, match=r"b\.json exists"):
        convert_adapter(tmp_path / "a.gguf", tmp_path / "b.safetensors", "sa3cpp")


def test_adapters_on_the_decoder_have_the_names_and_the_target_of_sa3cpp(tmp_path: Path) -> None:
    block = f"{DECODER}layers.3.transformers.1."
    names = {
        f"{DECODER}layers.1": "ae.in_proj",
        f"{block}self_attn.to_qkv": "ae.dec.1.self_attn.to_qkv",
        f"{block}self_attn.to_out": "ae.dec.1.self_attn.to_out",
        f"{block}ff.ff.0.proj": "ae.dec.1.ff.proj",
        f"{block}ff.ff.2": "ae.dec.1.ff.out",
    }
    tensors = {path: {"lora_A": torch.randn(2, 4), "lora_B": torch.randn(6, 2)} for path in names}
    adapter = Adapter(AdapterSpec("lora", rank=2), tensors, {}, "made")
    save_adapter(tmp_path / "a.safetensors", adapter, None)
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.gguf")
    reader = GGUFReader(tmp_path / "b.gguf")
    assert reader.fields["lora.target"].contents() == "decoder"
    assert {tensor.name for tensor in reader.tensors} == {f"{x}.lora_{y}" for x in names.values() for y in "AB"}
    assert load_adapter(tmp_path / "b.gguf").fingerprint == adapter.fingerprint
    convert_adapter(tmp_path / "b.gguf", tmp_path / "c.safetensors", "sa3cpp", dtype="fp32")
    assert json.loads((tmp_path / "c.json").read_text())["target"] == "decoder"
    assert load_adapter(tmp_path / "c.safetensors").fingerprint == adapter.fingerprint


FIELDS = {"lora.adapter_type": "lora", "lora.rank": 2, "lora.alpha": 2.0}
PAIR = {"dit.0.self.qkv.lora_A": torch.ones(2, 4), "dit.0.self.qkv.lora_B": torch.ones(6, 2)}


@pytest.mark.parametrize(
    ("fields", "tensors", "kind", "message"),
    [
        (FIELDS, {"blk.0.attn_q.weight.lora_a": torch.ones(2, 4)}, "sa3-lora", "which no adapter of sa3.cpp has"),
        (FIELDS, PAIR, "llama", "another model"),
        (FIELDS, PAIR, "sa3-dit", "whole model"),
        (FIELDS, {}, "sa3-lora", "no adapter tensors"),
        (FIELDS | {"lora.target": "encoder"}, PAIR, "sa3-lora", "what latents mean"),
        (FIELDS, PAIR | {"ae.in_proj.lora_A": torch.ones(2, 4)}, "sa3-lora", "two parts of the model"),
        (FIELDS | {"lora.rank": 0}, PAIR, "sa3-lora", r"lora\.rank"),
        (FIELDS | {"lora.adapter_type": "loha"}, PAIR, "sa3-lora", "loha"),
        (FIELDS | {"lora.alpha": float("nan")}, PAIR, "sa3-lora", r"lora\.alpha"),
        (FIELDS, PAIR | {"dit.0.self.qkv.lora_B": torch.ones(6, 3)}, "sa3-lora", "does not fit rank"),
        (FIELDS, PAIR | {"dit.0.self.qkv.lora_B": torch.ones(6, 2).long()}, "sa3-lora", "quantized"),
    ],
)
def test_other_gguf_files_are_refused(
    fields: dict[str, Any], tensors: dict[str, torch.Tensor], kind: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=message):
        load_adapter(write_raw(tmp_path / "a.gguf", fields, tensors, kind))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = (RECORDED / "bora-xs.gguf").read_bytes()
    endless = whole[:16] + struct.pack("<QQ", 1, 1) + b"a" + struct.pack("<IIQ", 9, 0, 2**60)
    for number, content in enumerate([endless, *(whole[:size] for size in range(4, len(whole), 97))]):
        (tmp_path / f"{number}.gguf").write_bytes(content)
        with pytest.raises(AdapterError, match="whole GGUF"):
            load_adapter(tmp_path / f"{number}.gguf")


def test_without_the_package_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"sa3train\[gguf\]"):
        load_adapter(RECORDED / "bora-xs.gguf")
