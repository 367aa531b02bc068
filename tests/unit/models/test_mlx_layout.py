"""Packs of the MLX builds are the same model: recorded values of the released code, the way back, what is refused."""

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.golden import GOLDEN, PLAIN, GoldenSet
from helpers.mlx_packs import (
    CODECS,
    RECORDED,
    RECORDED_CASES,
    make_dit,
    make_side,
    make_text,
    save_arrays,
    thin_out,
    write_packs,
)
from sa3train.adapters.adapter import BASE_SAMPLE
from sa3train.adapters.apply.load_report import check_fit
from sa3train.adapters.formats.io import load_adapter
from sa3train.adapters.layer_filter import find_adaptable_layers
from sa3train.adapters.tools import merge_adapters
from sa3train.core.errors import AdapterError, CheckpointError
from sa3train.models import mlx_layout
from sa3train.models.autoencoder import patchify
from sa3train.models.checkpoint import StableAudio3, load_checkpoint
from sa3train.models.conditioners import TextEncoder
from sa3train.models.config_reader import read_config_file
from sa3train.models.parse import complete_config, parse_model
from sa3train.models.text_source import TextEncoderSource
from sa3train.models.weight_files import are_rounded_alike

CASES = json.loads((RECORDED / "cases.json").read_text("utf-8"))
OUTPUTS = np.load(RECORDED / "outputs.npz")
"""Recorded by launch/check_mlx.py."""
SIDES = ("encoder", "decoder")
TOLERANCE = 1e-4
PACK = "dit_plain_f16.npz"
RELEASED = {"plain": "9604906af79c9506", "diff": "d17f457cd619b897"}
"""Hashes of the two packs that the MLX code was recorded with."""


@pytest.fixture(scope="module", params=CODECS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def packs(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packs(kind, tmp_path_factory.mktemp("packs")).parent


@pytest.fixture(scope="module")
def model(packs: Path) -> StableAudio3:
    return load_checkpoint(packs)


def hash_arrays(arrays: dict[str, np.ndarray]) -> str:
    hashed = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        hashed.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
    return hashed.hexdigest()[:16]


def test_the_packs_have_the_arrays_of_the_mlx_code(kind: str) -> None:
    state = load_file(GOLDEN / kind / "model.safetensors")
    assert hash_arrays(make_dit(state)) == RELEASED[kind]
    for side in SIDES:
        shapes = {name: list(array.shape) for name, array in make_side(state, side).items()}
        recorded = CASES["arrays"][f"same_{CODECS[kind]}_{side}"]
        assert shapes.keys() == recorded.keys()
        sizes = ({name: int(np.prod(shape)) for name, shape in each.items()} for each in (shapes, recorded))
        assert next(sizes) == next(sizes)


@torch.no_grad()
def test_velocities_latents_and_audio_are_the_recorded_ones(kind: str, model: StableAudio3) -> None:
    golden = GoldenSet(f"{kind}/cases")
    for case in golden.names("dit.forward")[:3]:
        tensors = golden.tensors(case)
        conditions = {f"{name}_{end}": tensors[name] for name, end in
                      (("cross_attn_cond", "BLD"), ("global_cond", "BD"), ("local_add_cond", "BCT"))}  # fmt: skip
        velocity_BCT = model.dit(tensors["x"], tensors["t"], **conditions)
        torch.testing.assert_close(velocity_BCT, tensors["velocity"], atol=TOLERANCE, rtol=0)
    tensors = golden.tensors("same.encode.8192")
    latents = model.autoencoder.encode(tensors["audio"], noise=False)
    torch.testing.assert_close(latents, tensors["latents"], atol=TOLERANCE, rtol=0)
    tensors = golden.tensors("same.decode.2")
    audio = model.autoencoder.decode(tensors["latents"], noise=False)
    torch.testing.assert_close(audio, tensors["audio"], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_latents_and_audio_are_those_of_the_mlx_code(kind: str, model: StableAudio3) -> None:
    golden = GoldenSet(f"{kind}/cases")
    audio, latents = (golden.tensors(RECORDED_CASES[side]) for side in SIDES)
    found = {
        "encoder": model.autoencoder.encode(audio["audio"], noise=False),
        "decoder": patchify(model.autoencoder.decode(latents["latents"], noise=False), 256).mT,
    }
    for side, output in found.items():
        recorded = OUTPUTS[f"same_{CODECS[kind]}_{side}"]
        np.testing.assert_allclose(thin_out(output.numpy()), recorded, atol=TOLERANCE, rtol=0)


def test_the_text_encoder_of_a_pack_is_the_recorded_one(tmp_path: Path) -> None:
    pack = tmp_path / "t5gemma_f16.npz"
    save_arrays(pack, make_text())
    encoder, wanted = TextEncoder(TextEncoderSource((), (), pack=pack), 64), CASES["text"]
    assert encoder.count_tokens(wanted["prompts"]) == [len(ids) for ids in wanted["tokens"]]
    ids = [encoding.ids for encoding in encoder.tokenizer.encode_batch(wanted["prompts"], add_special_tokens=False)]
    assert ids == wanted["tokens"]
    hidden_BLD, mask_BL = encoder(wanted["prompts"], torch.device("cpu"))
    recorded = torch.from_numpy(OUTPUTS["hidden"]).float()
    torch.testing.assert_close(hidden_BLD[mask_BL].float(), recorded[mask_BL], atol=0.02, rtol=0)  # both in fp16
    folder = encoder.source.folder()
    (folder / "mark").touch()
    assert (encoder.source.folder() / "mark").is_file()  # written once


def test_a_pack_that_we_write_is_read_back_exactly(kind: str, packs: Path, model: StableAudio3, tmp_path: Path) -> None:
    target = packs / "merged.npz"
    merge_adapters([], target, load_checkpoint(GOLDEN / kind), to="mlx")
    with np.load(target) as arrays:
        assert hash_arrays(dict(arrays)) == RELEASED[kind]
    adapter = GOLDEN / kind / "adapters" / "dora-rows.safetensors"
    merge_adapters([(adapter, 0.5)], target, load_checkpoint(packs), to="mlx", overwrite=True)
    merge_adapters([(adapter, 0.5)], tmp_path / "released", load_checkpoint(packs), to="released")
    read, released = load_checkpoint(target), load_checkpoint(tmp_path / "released")
    for part in ("dit", "conditioner"):
        state = getattr(released, part).state_dict()
        for name, tensor in getattr(read, part).state_dict().items():
            assert torch.equal(tensor, state[name]), name
    assert released.fingerprint() == read.fingerprint() != model.fingerprint()
    assert released.autoencoder_fingerprint() == model.autoencoder_fingerprint()
    target.unlink()


def test_what_a_pack_cannot_hold_is_refused(model: StableAudio3, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is no name of a pack"):
        merge_adapters([], tmp_path / "folder", model, to="mlx")
    with pytest.raises(CheckpointError, match="would not be finite in fp16"):
        mlx_layout.write_dit_pack(
            tmp_path / "x.npz", model.weights, {"model.model.to_cond_embed.0.weight": torch.tensor(1e6)}, ""
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["small-music", "small-music-base", "medium", "medium-base"])
def test_without_a_config_packs_are_the_released_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and names of the released files alone give their config."""
    size, letter = ("medium", "l") if name.startswith("medium") else ("small", "s")
    manifest = json.loads((GOLDEN / "state_dict_manifests.json").read_text())[size]
    state = {key: torch.zeros(1, dtype=torch.float16).expand(shape) for key, shape in manifest.items()}
    arrays = {f"dit_{name.replace('small-', 'sm-')}_f16.npz": make_dit(state)}
    whole = {key: torch.zeros(1).expand(shape) for key, shape in manifest.items() if "pretransform" in key}
    arrays |= {f"same_{letter}_{side}_f32.npz": make_side(whole, side) for side in SIDES}
    monkeypatch.setattr(
        mlx_layout, "read_npz_shapes", lambda path: {key: array.shape for key, array in arrays[path.name].items()}
    )
    raw = [mlx_layout.build_config(Path(next(iter(arrays)))), read_config_file(GOLDEN / "configs" / f"{name}.json")]
    built, released = (parse_model(each, "") for each in raw)
    text = replace(built.conditioner.text, model_path=None, repo_id=None, subfolder=None)
    unplaced = replace(released.conditioner.text, repo_id=None, subfolder=None)
    assert text == unplaced
    parts = ("dit", "autoencoder", "objective", "sample_size", "sample_rate", "chunked")
    assert {part: asdict(built)[part] for part in parts} == {part: asdict(released)[part] for part in parts}
    assert asdict(built.conditioner.seconds) == asdict(released.conditioner.seconds)
    own, theirs = (complete_config(each, "")["model"]["diffusion"] for each in raw)
    for key in ("distribution_shift_options", "mask_padding_attention", "use_effective_length_for_schedule"):
        assert own[key] == theirs[key]


def rewrite(name: str, **changes: np.ndarray | None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        arrays = dict(np.load(folder / name)) | changes
        save_arrays(folder / name, {key: array for key, array in arrays.items() if array is not None})

    return damage


def write_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


OBJECTS = np.array([{"a": 1}], dtype=object)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "same_s_decoder_f32.npz").unlink(), "same_s_decoder_f32.npz is missing"),
        (write_bytes(PACK, lambda data: data[:-4000]), "not a complete .npz file"),
        (write_bytes(PACK, lambda data: data[:400_000] + b"\1" + data[400_001:]), "not a complete .npz file.*CRC"),
        (write_bytes(PACK, lambda data: data.replace(b"'shape': (64, 128)", b"'shape': (64, 999)")), "its header"),
        (rewrite(PACK, weights=OBJECTS), "weights is not the array that its header"),
        (rewrite(PACK, weights=np.zeros(3)), "weights is float64; weights must be"),
        (rewrite(PACK, weights=np.zeros(3, np.float32)), "1 unexpected: model.model.weights"),
        (rewrite(PACK, **{"cond.padding_embedding": None}), "1 missing: conditioner.conditioners.prompt"),
        (rewrite("same_s_encoder_f32.npz", running_std=np.full(1, 2, np.float32)), "not of one SAME"),
        (rewrite("same_s_encoder_f32.npz", new_tokens=np.zeros((1, 1, 5), np.float32)), "of another shape"),
        (lambda folder: (folder / "dit_other_f16.npz").touch(), "holds several packs: dit_other_f16.npz, dit_plain"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write_packs("plain", tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_arrays_that_are_not_used_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pack = write_packs("plain", tmp_path)
    rewrite("same_s_encoder_f32.npz", new=np.zeros(3, np.float32))(tmp_path)
    load_checkpoint(pack, parts=())
    assert "1 arrays are not of a SAME and are not used: new" in caplog.text
    save_arrays(tmp_path / "t5gemma_f16.npz", make_text() | {"norm.bias": np.zeros(3, np.float16)})
    mlx_layout.unpack_text_encoder(tmp_path / "t5gemma_f16.npz")
    assert "1 arrays are not of a T5Gemma and are not used: encoder.norm.bias" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("META", b"[", "META is no config"), ("TOKENIZER_MODEL", b"\x0a\xff", "no model of SentencePiece"),
     ("TOKENIZER_MODEL", b"", "no model of SentencePiece")],
)  # fmt: skip
def test_a_damaged_text_encoder_is_refused(tmp_path: Path, key: str, value: bytes, message: str) -> None:
    pack = tmp_path / "t5gemma_f16.npz"
    save_arrays(pack, make_text() | {key: np.frombuffer(value, np.uint8)})
    with pytest.raises(CheckpointError, match=message):
        mlx_layout.unpack_text_encoder(pack)


def save_copy(folder: Path, state: dict[str, torch.Tensor], dtype: torch.dtype) -> StableAudio3:
    shutil.copytree(PLAIN, folder, ignore=shutil.ignore_patterns("*.safetensors", "cases*"))
    save_file({name: tensor.to(dtype) for name, tensor in state.items()}, folder / "model.safetensors")
    return load_checkpoint(folder, "meta", parts=("dit", "conditioner"))


def test_an_adapter_knows_its_base_in_another_precision(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.randn(tensor.shape, generator=rng)
        for name, tensor in load_file(PLAIN / "model.safetensors").items()
    }
    exact = load_file(PLAIN / "model.safetensors")
    state = {
        name: tensor if name.endswith("inv_freq") else tensor * (1 + 2**-9 * drawn[name])
        for name, tensor in exact.items()
    }
    tuned = {name: tensor + 1e-3 * tensor.std() * drawn[name] for name, tensor in state.items() if ".to_" in name}
    tuned = state | tuned
    (tmp_path / "packs").mkdir()
    copies = [
        save_copy(tmp_path / "fp32", state, torch.float32),
        save_copy(tmp_path / "bf16", state, torch.bfloat16),
        load_checkpoint(write_packs("plain", tmp_path / "packs", state), "meta", parts=("dit", "conditioner")),
    ]
    copies = [replace(copy, name="plain") for copy in copies]
    other = replace(save_copy(tmp_path / "tuned", tuned, torch.float32), name="plain")
    adapter = load_adapter(PLAIN / "adapters" / "lora.safetensors")

    def list_warnings(trained_on: StableAudio3, model: StableAudio3) -> list[str]:
        metadata = {"base_hash": trained_on.fingerprint(), BASE_SAMPLE: trained_on.sample_weights()}
        trained = replace(adapter, metadata={"base_model": "plain"} | metadata)
        layers = find_adaptable_layers(model.get_adapter_root())
        report, _ = check_fit(trained, layers, model, measure=False)
        return [warning for warning in report.warnings if "it was trained on" in warning]

    assert len({copy.fingerprint() for copy in copies}) > 1
    for copy in copies:
        assert [list_warnings(copy, model) for model in copies] == [[]] * len(copies)
        assert list_warnings(copy, other)
    assert not are_rounded_alike("no base64", copies[0].sample_weights())


def test_roundings_of_any_weights_are_alike() -> None:
    """Whatever the released weights are, fp16 holds: from numbers that it has as zero to the largest."""
    rng = torch.Generator().manual_seed(0)
    exponents = torch.rand(100_000, generator=rng) * 45 - 30
    exact = torch.exp2(exponents) * torch.randn(100_000, generator=rng).sign()
    copies = [exact.to(dtype).float() for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    samples = [base64.b64encode(copy.numpy().astype("<f4").tobytes()).decode() for copy in copies]
    assert all(are_rounded_alike(one, other) for one in samples for other in samples)
    others = [base64.b64encode((copy * 1.01).numpy().astype("<f4").tobytes()).decode() for copy in copies]
    assert not any(are_rounded_alike(one, other) for one in samples for other in others)
