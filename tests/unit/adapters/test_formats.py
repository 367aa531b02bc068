"""PEFT folders and ComfyUI files: the same tensors or the same change there and back, and what is lost is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers.golden import PLAIN
from helpers.small_model import Small, train_adapter
from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.layer_weight import get_layer_adapter
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.formats.comfy import ENDINGS, read_comfy
from sa3train.adapters.formats.comfy_write import write_comfy
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.adapters.formats.peft import NAMES, parse_peft_tensors, write_peft_folder
from sa3train.adapters.layer_filter import find_adaptable_layers
from sa3train.adapters.spec import ADAPTER_TYPES, CARRIED_BY, KINDS, AdapterSpec
from sa3train.adapters.tools.convert import FORMATS, convert_adapter
from sa3train.adapters.tools.low_rank import Truncation
from sa3train.core.errors import AdapterError, SA3Error
from sa3train.core.safetensors_file import write_tensors
from sa3train.core.text import format_share
from sa3train.models.checkpoint import StableAudio3, load_checkpoint

CONV, LINEAR = "model.preprocess_conv", "model.transformer.layers.0.self_attn.to_qkv"
EMBEDDER = "conditioners.seconds_total.embedder.embedding.1"


def golden(kind: str) -> Path:
    return PLAIN / "adapters" / f"{kind}.safetensors"


@pytest.fixture(scope="module")
def model() -> StableAudio3:
    return load_checkpoint(PLAIN, parts=("dit", "conditioner"))


def assert_same_bits(first: Adapter, second: Adapter) -> None:
    assert first.tensors.keys() == second.tensors.keys()
    for path, params in first.tensors.items():
        assert params.keys() == second.tensors[path].keys()
        for name, tensor in params.items():
            assert tensor.dtype == second.tensors[path][name].dtype
            assert torch.equal(tensor, second.tensors[path][name]), (path, name)
        assert first.spec.get_scale(path) == second.spec.get_scale(path)
        assert first.spec.get_rank(path) == second.spec.get_rank(path)


def small(kind: str = "lora", rank: int = 2, **settings: Any) -> Adapter:
    torch.manual_seed(0)
    spec = AdapterSpec(kind, rank=rank, **settings)
    tensors = {}
    for path in (CONV, LINEAR, EMBEDDER):
        shapes = KINDS[kind].shapes(6, 4, spec.get_rank(path))
        tensors[path] = {name: torch.randn(shape) for name, shape in shapes.items()}
    return Adapter(spec, tensors, {"trigger": "zing"}, "small")


@pytest.mark.parametrize("kind", ["lora", "dora-rows"])
def test_native_to_peft_to_native_keeps_every_bit_and_setting(kind: str, tmp_path: Path) -> None:
    original = load_adapter(golden(kind))
    save_adapter(tmp_path / "folder", original)
    assert {item.name for item in (tmp_path / "folder").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    through = load_adapter(tmp_path / "folder")
    save_adapter(tmp_path / "back.safetensors", through)
    back = load_adapter(tmp_path / "back.safetensors")
    assert_same_bits(original, back)
    assert back.spec == original.spec
    before, after = load_file(golden(kind)), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 2, "alpha": 5.0, "rslora": True, "dropout": 0.1, "include": ["model.", "conditioners."]},
        {"rank": 2, "rank_pattern": {"self_attn": 3}},
        {"rank": 2, "alpha": 4.0, "alpha_pattern": {"conditioners": 1.5}, "exclude": ["cross_attn"]},
    ],
)
def test_scales_ranks_filters_and_metadata_survive_a_peft_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    original = small("dora-rows", **settings)
    write_peft_folder(tmp_path / "folder", original)
    back = load_adapter(tmp_path / "folder")
    assert_same_bits(original, back)
    assert (back.spec.include, back.spec.exclude) == (original.spec.include, original.spec.exclude)
    assert (back.spec.dropout, back.spec.rslora) == (original.spec.dropout, original.spec.rslora)
    assert back.metadata["trigger"] == "zing"


class OfTwo(nn.ModuleDict):
    """A convolution and a linear layer under released names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self["model"] = nn.ModuleDict({"preprocess_conv": nn.Conv1d(4, 6, 1), "project": nn.Linear(4, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("kind", ["lora", "dora-rows"])
def test_peft_itself_plays_our_folder_and_we_play_peft_s(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    spec = AdapterSpec(kind, rank=2, alpha=3.0, rank_pattern={"project": 3})
    paths = ("model.preprocess_conv", "model.project")
    shapes = {path: KINDS[kind].shapes(6, 4, spec.get_rank(path)) for path in paths}
    torch.manual_seed(2)
    tensors = {path: {name: torch.rand(shape) for name, shape in shapes[path].items()} for path in paths}
    write_peft_folder(tmp_path / "ours", Adapter(spec, tensors))
    base = find_adaptable_layers(OfTwo())
    theirs = PeftModel.from_pretrained(OfTwo(), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    merged = find_adaptable_layers(theirs.merge_and_unload())
    again = load_adapter(tmp_path / "theirs")
    for path in paths:
        W: Any = base[path].weight
        expected: Any = merged[path].weight
        for adapter in (Adapter(spec, tensors), again):
            torch.testing.assert_close(get_layer_adapter(adapter, path, W).weight(W), expected, atol=1e-5, rtol=0)


def test_other_methods_of_peft_go_through_a_folder(tmp_path: Path) -> None:
    adapter = train_adapter(AdapterSpec("lokr", rank=2, alpha=3.0, include=["layers[0-1]"]), Small())
    save_adapter(tmp_path / "folder", adapter, None)
    again = load_adapter(tmp_path / "folder")
    weights = {path: layer.weight.detach() for path, layer in find_adaptable_layers(Small()).items()}  # type: ignore[operator]
    assert again.tensors.keys() == adapter.tensors.keys()
    for path in adapter.tensors:
        W = weights[path]
        assert torch.equal(get_layer_adapter(again, path, W).weight(W), get_layer_adapter(adapter, path, W).weight(W))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("lora", "dora-rows")])
def test_peft_is_refused_what_it_cannot_hold(kind: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"PEFT has no {kind}"):
        save_adapter(tmp_path / "folder", load_adapter(golden(kind)))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "song.txt").write_text("la")
    with pytest.raises(SA3Error, match="is something else"):
        save_adapter(tmp_path / "mine", small())
    assert (tmp_path / "mine" / "song.txt").read_text() == "la"
    save_adapter(tmp_path / "peft", small())
    save_adapter(tmp_path / "peft", small(rank=3))
    assert load_adapter(tmp_path / "peft").spec.rank == 3
    assert sorted(item.name for item in tmp_path.iterdir()) == ["mine", "peft"]


def test_damaged_peft_folders_are_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path / "peft", small())
    config_file = tmp_path / "peft" / "adapter_config.json"
    good = json.loads(config_file.read_text())
    for change, message in (
        ({"peft_type": "PREFIX_TUNING"}, "not supported"),
        ({"use_dora": True}, "contradict"),
        ({"alpha_pattern": {"(a|b)+": 3}}, "is an expression"),
        ({"lora_alpha": "x"}, "alpha must be a number"),
        ({"lora_alpha": 0}, "alpha"),
        ({"bias": "all"}, "trains biases"),
    ):
        config_file.write_text(json.dumps(good | change))
        with pytest.raises(AdapterError, match=message):
            load_adapter(tmp_path / "peft")
    config_file.write_text("[" * 50)
    with pytest.raises(AdapterError, match="nested"):
        load_adapter(tmp_path / "peft")
    config_file.unlink()
    with pytest.raises(AdapterError, match="cannot be read"):
        load_adapter(tmp_path / "peft")
    config_file.write_text(json.dumps(good))
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.model.a.modules_to_save.weight": torch.ones(2)}, tmp_path / "peft" / "x.st")
    with pytest.raises(AdapterError, match="is not supported"):
        load_adapter(tmp_path / "peft" / "x.st")
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is missing\. A PEFT folder"):
        load_adapter(tmp_path / "peft")
    for name in ("a", "b"):
        save_file(tensors, tmp_path / "peft" / f"{name}.safetensors")
    with pytest.raises(AdapterError, match=r"one of the files in it: .*a\.safetensors, .*b\.safetensors"):
        load_adapter(tmp_path / "peft")


def test_peft_s_own_names_are_read_whatever_it_wrapped() -> None:
    tensors = {
        "base_model.model.transformer.project_in.lora_A.weight": torch.ones(2, 4),
        "base_model.model.transformer.project_in.lora_B.weight": torch.ones(3, 2),
    }
    config = {
        "peft_type": "LORA",
        "lora_alpha": 4,
        "target_modules": ["project_in"],
        "base_model_name_or_path": "medium",
    }
    adapter = parse_peft_tensors("file", tensors, config, {})
    assert list(adapter.tensors) == ["model.transformer.project_in"]
    assert adapter.spec.get_scale("model.transformer.project_in") == 2.0
    assert (adapter.metadata["base_model"], adapter.spec.include) == ("medium", ("project_in",))


def test_comfy_keeps_a_lora_s_bits_and_scale_and_leaves_the_embedder_out(tmp_path: Path) -> None:
    for given_scale in ({}, {"alpha": 5.0, "rslora": True}, {"rank_pattern": {"self_attn": 4}, "alpha": 3.0}):
        original = small("lora", **given_scale)
        write_comfy(tmp_path / "a.safetensors", original, None)
        stored = load_file(tmp_path / "a.safetensors")
        assert all(key.startswith("diffusion_model.") for key in stored)
        names = {key.removeprefix("diffusion_model.preprocess_conv.") for key in stored if ".preprocess_conv." in key}
        assert names == {"lora_up.weight", "lora_down.weight", *(["alpha"] if given_scale else [])}
        back = load_adapter(tmp_path / "a.safetensors")
        assert back.tensors.keys() == original.tensors.keys() - {EMBEDDER}
        for path, params in back.tensors.items():
            assert all(torch.equal(tensor, original.tensors[path][name]) for name, tensor in params.items())
            assert back.spec.get_scale(path) == pytest.approx(original.spec.get_scale(path), rel=1e-6)
        assert back.metadata["trigger"] == "zing"


@pytest.mark.parametrize("kind", KINDS)
def test_native_to_comfy_to_our_own_play_of_it_is_the_same_within_a_thousandth(
    kind: str, model: StableAudio3, tmp_path: Path
) -> None:
    target = tmp_path / "comfy.safetensors"
    done = convert_adapter(golden(kind), target, "comfy", model)
    assert not any("seconds_total" in key for key in load_file(target))
    original = load_adapter(golden(kind))
    has_embedder = EMBEDDER in original.tensors
    assert any("not carried over" in text and EMBEDDER in text for text in done.warnings) == has_embedder
    assert done.error.relative < 1e-3

    torch.manual_seed(0)
    width = model.latent_channels
    inputs = (torch.randn(1, width, 6), torch.tensor([0.6]))
    outputs = []
    for adapter in (original, load_adapter(target)):
        stack = AdapterStack(model.get_adapter_root())
        stack.add(adapter, conditioner_strength=0.0)
        stack.apply()
        outputs.append(velocity(model, *inputs))
        stack.clear()
    untouched = velocity(model, *inputs)
    assert (outputs[0] - outputs[1]).abs().max() < 1e-3
    assert (outputs[0] - untouched).abs().max() > 1e-2


def velocity(model: StableAudio3, x_BCT: Tensor, t_B: Tensor) -> Tensor:
    with torch.no_grad():
        conditioning = model.conditioner.condition(model.conditioner.encode_prompts(["hum"]), torch.tensor([1.0]))
        result: Tensor = model.dit(
            x_BCT, t_B, cross_attn_cond_BLD=conditioning.cross_attn_cond_BLD, global_cond_BD=conditioning.global_cond_BD
        )
    return result


@pytest.mark.parametrize(
    ("kind", "way"), [("bora", "full weight deltas"), ("dora-rows", "dora_scale"), ("lora-xs", "bases multiplied in")]
)
def test_comfy_needs_the_model_for_kinds_it_does_not_have(kind: str, way: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"model=NAME.*{way}"):
        convert_adapter(golden(kind), tmp_path / "a.safetensors", "comfy")
    assert list(tmp_path.iterdir()) == []


def test_an_approximation_states_the_error_that_the_file_then_has(model: StableAudio3, tmp_path: Path) -> None:
    errors = []
    for rank in (2, 16, 64):
        done = convert_adapter(golden("bora"), tmp_path / f"{rank}", "peft", model, Truncation(rank))
        assert done.adapter.spec.adapter_type == "lora"
        stated = next(note for note in done.notes if "approximated" in note)
        assert format_share(done.error.relative) in stated
        errors.append(done.error.relative)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 2
    with pytest.raises(AdapterError, match="use: sa3-adapter resize"):
        convert_adapter(golden("dora-rows"), tmp_path / "x", "peft", model, Truncation(2))


@pytest.mark.parametrize("kind", ["lora-xs", "dora-rows-xs"])
def test_frozen_bases_are_multiplied_in_for_peft(kind: str, model: StableAudio3, tmp_path: Path) -> None:
    done = convert_adapter(golden(kind), tmp_path / "folder", "peft", model, dtype="fp32")
    assert load_adapter(tmp_path / "folder").spec.adapter_type == kind.removesuffix("-xs")
    assert done.error.relative < 1e-5


def comfy(tensors: dict[str, Tensor]) -> Adapter:
    return read_comfy("file", tensors, {})


def test_files_for_comfy_from_elsewhere_are_read() -> None:
    W, up, down = torch.randn(3, 4), torch.randn(3, 2), torch.randn(2, 4)
    key, path = "diffusion_model.transformer.project_in", "model.transformer.project_in"

    without_alpha = comfy({f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down})
    torch.testing.assert_close(get_layer_adapter(without_alpha, path, W).weight(W), W + up @ down)
    other_names = comfy({f"{key}.lora_B.weight": up, f"{key}.lora_A.weight": down, f"{key}.alpha": torch.tensor(1.0)})
    torch.testing.assert_close(get_layer_adapter(other_names, path, W).weight(W), W + up @ down / 2)
    underscored = comfy(
        {
            "lora_unet_transformer_project_in.lora_up.weight": up,
            "lora_unet_transformer_project_in.lora_down.weight": down,
        }
    )
    assert list(underscored.tensors) == [path]
    deep = "transformer_layers_11_self_attn_to_qkv", "model.transformer.layers.11.self_attn.to_qkv"
    assert list(comfy({f"lora_unet_{deep[0]}.diff": W}).tensors) == [deep[1]]
    deep = "transformer_layers_0_ff_ff_0_proj", "model.transformer.layers.0.ff.ff.0.proj"
    assert list(comfy({f"lora_unet_{deep[0]}.diff": W}).tensors) == [deep[1]]

    scale = torch.rand(3, 1)
    dora = comfy({f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.dora_scale": scale})
    assert dora.spec.adapter_type == "comfy"
    expected = (W + up @ down) * scale / W.norm(dim=1, keepdim=True)
    torch.testing.assert_close(get_layer_adapter(dora, path, W).weight(W), expected, atol=1e-5, rtol=1e-5)

    square, by_column = torch.randn(4, 4), torch.rand(1, 4)
    dora = comfy(
        {f"{key}.lora_up.weight": torch.ones(4, 2), f"{key}.lora_down.weight": down, f"{key}.dora_scale": by_column}
    )
    V = square + torch.ones(4, 2) @ down
    expected = V * by_column / V.norm(dim=0, keepdim=True)
    torch.testing.assert_close(get_layer_adapter(dora, path, square).weight(square), expected, atol=1e-5, rtol=1e-5)


def test_comfy_files_may_mix_low_rank_layers_whole_differences_and_biases() -> None:
    W, up, down = torch.randn(3, 4), torch.randn(3, 2), torch.randn(2, 4)
    mixed = comfy(
        {
            "diffusion_model.preprocess_conv.lora_up.weight": up[:, :, None],
            "diffusion_model.preprocess_conv.lora_down.weight": down[:, :, None],
            "diffusion_model.preprocess_conv.alpha": torch.tensor(4.0),
            "diffusion_model.transformer.project_in.diff": torch.ones(3, 4),
            "diffusion_model.transformer.project_out.diff_b": torch.ones(3),
        }
    )
    assert mixed.spec.adapter_type == "lora"
    assert mixed.tensors[CONV].keys() == {"lora_A", "lora_B"}
    W_conv = W[:, :, None]
    torch.testing.assert_close(
        get_layer_adapter(mixed, CONV, W_conv).weight(W_conv), W_conv + 2 * (up @ down)[:, :, None]
    )
    torch.testing.assert_close(get_layer_adapter(mixed, "model.transformer.project_in", W).weight(W), W + 1)
    bias_only = get_layer_adapter(mixed, "model.transformer.project_out", W)
    assert torch.equal(bias_only.weight(W), W)
    change = bias_only.bias_change()
    assert change is not None
    assert torch.equal(change, torch.ones(3))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"diffusion_model.a.lora_mid.weight": torch.ones(2)}, "is not supported"),
        ({"diffusion_model.a.lora_up.weight": torch.ones(2, 2)}, "incomplete or damaged"),
        (
            {
                "diffusion_model.a.lora_up.weight": torch.ones(2, 2),
                "diffusion_model.a.lora_down.weight": torch.ones(3, 2),
            },
            "do not fit",
        ),
        ({"lora_unet_not_a_layer.diff": torch.ones(2)}, "not a layer of Stable Audio 3"),
        ({"diffusion_model.a.alpha": torch.tensor(1.0)}, "only alpha"),
    ],
)
def test_damaged_comfy_files_are_refused(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        comfy(tensors)


class Evil:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("pwned", "w"))


def test_pickles_are_refused_as_adapters_and_converted_without_running_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    original = load_adapter(golden("dora-rows"))
    native = load_file(golden("dora-rows"))
    wrapped = {
        f"diffusion.model.{key}" if key.startswith("model.") else f"diffusion.conditioner.{key}": tensor
        for key, tensor in native.items()
    }
    config = json.loads(original.metadata["lora_config"])
    torch.save({"state_dict": wrapped | {"diffusion.step": torch.ones(1)}, "lora_config": config}, "a.ckpt")
    with pytest.raises(AdapterError, match=r"is a pickle.*sa3-adapter convert"):
        load_adapter("a.ckpt")
    done = convert_adapter("a.ckpt", "a.safetensors", "native")
    assert_same_bits(original, load_adapter("a.safetensors"))
    assert any("1 tensors of the file do not belong to the adapter" in note for note in done.notes)

    torch.save(native, "bare.pt")
    assert any("no lora_config" in note for note in convert_adapter("bare.pt", "bare.safetensors", "native").notes)

    save_adapter("peft", original)
    torch.save(load_file("peft/adapter_model.safetensors"), "peft/adapter_model.bin")
    convert_adapter("peft/adapter_model.bin", "from_bin.safetensors", "native")
    assert_same_bits(original, load_adapter("from_bin.safetensors"))

    for name, content in (
        ("evil.ckpt", {"state_dict": native, "x": Evil()}),
        ("none.pt", [1, 2]),
        ("whole.pt", {"a": torch.ones(2)}),
    ):
        torch.save(content, name)
        with pytest.raises(AdapterError, match=r"refused|no dict of tensors|no adapter"):
            convert_adapter(name, "never.safetensors", "native")
    Path("cut.pt").write_bytes(Path("a.ckpt").read_bytes()[:2000])
    with pytest.raises(AdapterError, match="refused"):
        convert_adapter("cut.pt", "never.safetensors", "native")
    assert not Path("pwned").exists()
    assert not Path("never.safetensors").exists()


SHAPES = st.lists(st.integers(0, 3), max_size=4).map(tuple)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


PEFT_KEYS = [*(f"x.{name}" for name in NAMES.values()), "x.lokr_w1", "odd"]
SETTINGS = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "lora_dropout", "bias", "target_modules",
    "peft_type", "use_rslora", "base_model_name_or_path", "alpha",
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(PEFT_KEYS), SHAPES, min_size=1),
    st.dictionaries(st.sampled_from(SETTINGS), JUNK),
    st.sampled_from(["LORA", "LOKR", "OFT"]),
)
@pytest.mark.slow
def test_nothing_in_a_peft_folder_makes_more_than_an_error(
    shapes: dict[str, tuple[int, ...]], config: dict[str, Any], method: str
) -> None:
    tensors = {f"base_model.model.{key}": torch.ones(shape) for key, shape in shapes.items()}
    try:
        adapter = parse_peft_tensors("file", tensors, {"peft_type": method} | config, {})
    except AdapterError:
        return
    assert adapter.tensors


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.tuples(
            st.sampled_from(["diffusion_model.a", "lora_unet_transformer_layers_0_ff", "odd"]),
            st.sampled_from([*ENDINGS]),
        ),
        SHAPES,
        min_size=1,
    ),
    st.floats(width=32),
)
@pytest.mark.slow
def test_nothing_in_a_comfy_file_makes_more_than_an_error(
    shapes: dict[tuple[str, str], tuple[int, ...]], alpha: float
) -> None:
    try:
        adapter = comfy({f"{path}.{end}": torch.full(shape, alpha) for (path, end), shape in shapes.items()})
    except AdapterError:
        return
    assert adapter.tensors


def test_the_target_must_suit_the_format(tmp_path: Path) -> None:
    for target, to in (
        (tmp_path / "folder", "comfy"),
        (tmp_path / "file.safetensors", "peft"),
        (tmp_path / "x", "zip"),
    ):
        with pytest.raises(AdapterError, match=r"does not suit|Unknown format"):
            convert_adapter(golden("lora"), target, to)


def test_each_type_says_which_formats_carry_it() -> None:
    assert CARRIED_BY.keys() == set(ADAPTER_TYPES)
    assert {name for formats in CARRIED_BY.values() for name in formats} <= set(FORMATS)


def test_equal_content_gives_equal_files(tmp_path: Path) -> None:
    tensors, names = {"b": torch.ones(2), "a": torch.zeros(3)}, [f"ä{number}\n" for number in range(12)]
    for file, order in (("one.safetensors", names), ("two.safetensors", names[::-1])):
        write_tensors(tmp_path / file, tensors, dict.fromkeys(order, '漢 😀\x1f"'))
    content = (tmp_path / "one.safetensors").read_bytes()
    assert content == (tmp_path / "two.safetensors").read_bytes()
    assert list(json.loads(content[8 : 8 + content[0] + 256 * content[1]])["__metadata__"]) == sorted(names)
    assert load_file(tmp_path / "one.safetensors").keys() == tensors.keys()
