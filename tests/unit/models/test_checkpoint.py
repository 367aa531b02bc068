"""Loading is strict, exact in every precision, and says what is wrong and what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.golden import GOLDEN
from sa3train.core.errors import CheckpointError
from sa3train.models.checkpoint import load_autoencoder, load_checkpoint
from sa3train.models.weight_files import iterate_tensors

PLAIN = GOLDEN / "plain"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder in the released layout that a test may damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("model_config.json", "model.safetensors"):
        shutil.copy(PLAIN / name, folder)
    return folder


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of the file (dots written as double underscores); None removes one."""
    state = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        if tensor is None:
            del state[key]
        else:
            state[key] = tensor
    save_file(state, folder / "model.safetensors")


def standalone(folder: Path) -> Path:
    """The same autoencoder as a stand-alone SAME folder."""
    folder.mkdir()
    prefix = "pretransform.model."
    state = load_file(PLAIN / "model.safetensors")
    same = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    save_file(same, folder / "model.safetensors")
    raw = json.loads((PLAIN / "model_config.json").read_text())
    config = {"model_type": "autoencoder", "sample_rate": 44100, "model": raw["model"]["pretransform"]["config"]}
    (folder / "model_config.json").write_text(json.dumps(config))
    return folder


def test_facts_of_a_loaded_model() -> None:
    model = load_checkpoint(PLAIN)
    assert (model.name, model.path, model.sibling) == ("plain", PLAIN, None)
    assert (model.sample_rate, model.objective) == (44100, "rectified_flow")
    assert (model.latent_channels, model.downsampling_ratio, model.max_frames) == (64, 4096, 1292)
    assert not any(weight.requires_grad for weight in model.get_adapter_root().parameters())
    assert not model.dit.training


def test_only_the_asked_parts_are_loaded() -> None:
    model = load_checkpoint(PLAIN, parts=("dit",))
    assert model.dit is not None
    assert model.conditioner is None
    assert model.autoencoder is None
    with pytest.raises(ValueError, match=r"parts=\('dit', 'conditioner'\)"):
        model.get_adapter_root()
    with pytest.raises(ValueError, match="vae"):
        load_checkpoint(PLAIN, parts=("vae",))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_in_and_out(copy: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    state = {name: tensor.to(stored) for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(state, copy / "model.safetensors")
    model = load_checkpoint(copy, dtype=wanted)
    name = "transformer.layers.0.self_attn.to_qkv.weight"
    assert torch.equal(model.dit.get_parameter(name), state[f"model.model.{name}"].to(wanted))
    floating = {tensor.dtype for tensor in model.dit.parameters()} | {t.dtype for t in model.autoencoder.parameters()}
    assert floating == {wanted}
    exact = 1.0 / 10_000.0 ** (torch.arange(0, 32, 2) / 32)
    assert torch.equal(model.dit.get_buffer("transformer.rotary_pos_emb.inv_freq"), exact)


def test_loading_in_the_stored_precision_maps_the_file_and_never_writes_it(copy: Path) -> None:
    state = {name: tensor.float() for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(state, copy / "model.safetensors")
    before = (copy / "model.safetensors").read_bytes()
    model = load_checkpoint(copy)
    weight = model.dit.get_parameter("transformer.project_in.weight")
    assert str((copy / "model.safetensors").resolve()) in Path("/proc/self/maps").read_text()
    with torch.no_grad():
        weight.fill_(5.0)
    assert (copy / "model.safetensors").read_bytes() == before


def test_reading_in_windows_gives_every_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sa3train.models.weight_files._RELEASE_AFTER", 100_000)
    state = load_file(PLAIN / "model.safetensors")
    found = list(iterate_tensors(PLAIN / "model.safetensors", sorted(state), "cpu", torch.float64))
    assert [name for name, _ in found] == sorted(state)
    assert all(torch.equal(tensor, state[name].double()) for name, tensor in found)


def test_a_standalone_autoencoder_is_the_same_one(tmp_path: Path) -> None:
    folder = standalone(tmp_path / "same")
    alone, inside = load_autoencoder(folder), load_autoencoder(PLAIN)
    audio = torch.randn(1, 2, 8192)
    assert torch.equal(alone.encode(audio), inside.encode(audio))
    assert alone.fingerprint() == inside.fingerprint() == load_checkpoint(PLAIN).autoencoder.fingerprint()
    assert load_checkpoint(PLAIN, parts=("autoencoder",)).autoencoder.chunked is False
    with pytest.raises(CheckpointError, match="is a stand-alone autoencoder"):
        load_checkpoint(folder)


def test_fingerprints_know_the_weights_and_not_the_file(copy: Path) -> None:
    model = load_checkpoint(PLAIN)
    base, latents = model.fingerprint(), model.autoencoder.fingerprint()
    assert len(base) == len(latents) == 64
    assert base == load_checkpoint(PLAIN, dtype=torch.bfloat16).fingerprint()
    state = load_file(copy / "model.safetensors")
    save_file({name: tensor.float() for name, tensor in state.items()}, copy / "model.safetensors")
    assert load_checkpoint(copy).fingerprint() == base, "an fp32 copy is the same base"
    assert load_checkpoint(GOLDEN / "diff").fingerprint() != base
    rewrite(
        copy, model__model__transformer__project_out__weight=state["model.model.transformer.project_out.weight"] * 2
    )
    changed = load_checkpoint(copy)
    assert changed.fingerprint() != base
    assert changed.autoencoder.fingerprint() == latents
    memory = load_autoencoder(copy)
    memory.file_fingerprint = None
    assert memory.fingerprint() == latents, "weights in memory have the digest of their file"


def test_the_encoder_is_read_when_it_is_first_needed(copy: Path) -> None:
    whole, later = load_checkpoint(copy).autoencoder, load_checkpoint(copy, lazy_encoder=True).autoencoder
    audio_BCN, latents_BCT = torch.randn(1, 2, 4 * 4096), torch.randn(1, whole.latent_channels, 6)
    assert torch.equal(later.decode(latents_BCT, noise=False), whole.decode(latents_BCT, noise=False))
    assert all(tensor.is_meta for tensor in later.encoder.parameters()), "decoding reads no encoder"
    assert later.fingerprint() == whole.fingerprint()
    assert torch.equal(later.encode(audio_BCN, noise=False), whole.encode(audio_BCN, noise=False))
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in later.state_dict().values())
    gone = load_checkpoint(copy, lazy_encoder=True).autoencoder
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        gone.encode(audio_BCN)


@pytest.mark.parametrize("load", [load_checkpoint, load_autoencoder])
def test_what_is_no_checkpoint_is_refused(load: object, tmp_path: Path) -> None:
    assert callable(load)
    with pytest.raises(
        CheckpointError, match=r"no model called '.*nowhere'.*Known names: nano, nano-base, small-music"
    ):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="Did you mean small-music-base"):
        load("small-musik-base")
    with pytest.raises(CheckpointError, match=r"not a checkpoint: model_config.json and model.safetensors missing"):
        load(tmp_path)
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"is a file.*pickles .* are not read"):
        load(pickle)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not a checkpoint: model\.safetensors missing"):
        load_checkpoint(copy)


@pytest.mark.parametrize("keep", [0, 5, 5_000, 1_000_000])
def test_a_truncated_file_is_told(copy: Path, keep: int) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"not a complete safetensors file.*download or copy it again"):
        load_checkpoint(copy)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1, 2]"])
def test_a_broken_config_is_told(copy: Path, content: bytes) -> None:
    (copy / "model_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="JSON"):
        load_checkpoint(copy)


def test_another_architecture_lists_what_differs(copy: Path) -> None:
    shutil.copy(GOLDEN / "diff" / "model.safetensors", copy)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(copy)
    message = str(caught.value)
    assert "of another shape: model.model.transformer.layers.0.self_attn.to_qkv.weight (file [640, 128]" in message
    assert "expected [384, 128])" in message
    assert "one repository" in message


def test_missing_and_unexpected_tensors_are_listed_even_in_parts_not_asked_for(copy: Path) -> None:
    rewrite(copy, pretransform__model__bottleneck__bias=None, surprise=torch.zeros(1))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(copy, parts=("dit",))
    assert "1 missing: pretransform.model.bottleneck.bias" in str(caught.value)
    assert "1 unexpected: surprise" in str(caught.value)


def test_other_rotary_frequencies_and_dtypes_are_refused(copy: Path) -> None:
    rewrite(copy, model__model__transformer__rotary_pos_emb__inv_freq=torch.ones(16))
    with pytest.raises(CheckpointError, match="other rotary frequencies"):
        load_checkpoint(copy)
    rewrite(copy, pretransform__model__bottleneck__running_std=torch.ones(1, dtype=torch.int8))
    with pytest.raises(CheckpointError, match="running_std is I8; weights must be F32, BF16 or F16"):
        load_checkpoint(copy)
