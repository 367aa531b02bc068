"""nano is made on first use, once, by whoever comes first, and is a checkpoint like any other."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sa3train.core.errors import SA3Error
from sa3train.models import nano
from sa3train.models.checkpoint import StableAudio3, load_checkpoint
from sa3train.models.conditioners import TextEncoder

TEXT = Path("t5gemma") / "model.safetensors"
OUT = "model.model.transformer.project_out.weight"


@pytest.fixture(scope="module")
def model() -> StableAudio3:
    """The base as it ships."""
    return load_checkpoint("nano-base")


def parameters(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def test_it_is_small_and_shaped_as_released(model: StableAudio3) -> None:
    dit = parameters(model.dit) + parameters(model.conditioner)
    assert parameters(model.dit) <= 10e6
    assert parameters(model.autoencoder) <= 7e6
    assert 8e6 < dit + parameters(model.autoencoder) < 12e6
    files = ("nano.safetensors", "nano-base.safetensors", "autoencoder.safetensors", "t5gemma/model.safetensors")
    assert sum((nano.ASSETS / name).stat().st_size for name in files) < 30e6
    assert (model.latent_channels, model.downsampling_ratio, model.max_frames) == (nano.LATENT_WIDTH, 4096, 1292)
    assert model.config.autoencoder.encoder.chunk_size == 32
    assert not model.config.dit.differential
    assert model.config.chunked


def test_both_models_and_their_relation(model: StableAudio3) -> None:
    post = load_checkpoint("nano")
    assert (model.objective, model.sibling) == ("rectified_flow", "nano")
    assert (post.objective, post.sibling) == ("rf_denoiser", "nano-base")
    assert post.path.parent == model.path.parent


def test_the_post_trained_matrices_ship_as_steps_from_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano, "ASSETS", tmp_path)
    base = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).half(), "b": torch.ones(2).half()}
    steps = {"a": torch.tensor([[-127, 1], [0, 2]], dtype=torch.int8), "a.step": torch.tensor([[0.25], [0.5]]).half()}
    save_file({**steps, "b": torch.zeros(2).half()}, tmp_path / "nano.safetensors")
    made = nano.read_post_trained(base)
    assert made.keys() == base.keys()
    assert made["a"].tolist() == [[1 - 127 / 4, 2.25], [3, 5]]
    assert made["a"].dtype == torch.float16
    assert not made["b"].any()


@torch.inference_mode()
def test_it_is_finite_and_audible(model: StableAudio3) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, nano.LATENT_WIDTH, 20, generator=generator)
    audio = model.autoencoder.decode(z, generator=generator)
    assert audio.isfinite().all()
    assert 0.01 < audio.std() < 1
    assert 0.2 < model.autoencoder.encode(0.1 * torch.randn(1, 2, 81920, generator=generator)).std() < 5
    condition = model.conditioner(["a slow low hum", ""], [2.0, 30.0])
    assert not torch.equal(condition.cross_attn_cond_BLD[0], condition.cross_attn_cond_BLD[1])
    velocity = model.dit(
        z.expand(2, -1, -1),
        torch.tensor([0.9, 0.1]),
        cross_attn_cond_BLD=condition.cross_attn_cond_BLD,
        global_cond_BD=condition.global_cond_BD,
        local_add_cond_BCT=torch.zeros(2, nano.LATENT_WIDTH + 1, 20),
    )
    assert velocity.isfinite().all()
    assert 0.05 < velocity.std() < 5


def test_its_tokenizer_reads_every_byte(model: StableAudio3) -> None:
    text = "Größe 🎵 140 BPM\n"
    encoder: TextEncoder = model.conditioner.text_encoder
    counts = model.conditioner.count_tokens([text, "", "TrackType: Instrument, Instruments: Piano, BPM: 112"])
    assert counts[1] == 0 < counts[2] < 20 < len(text.encode())
    assert (
        encoder.tokenizer.decode(encoder.tokenizer.encode(text, add_special_tokens=False).ids).strip() == text.strip()
    )


def test_it_is_the_same_again_and_leaves_the_callers_stream_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: StableAudio3
) -> None:
    monkeypatch.setenv("SA3TRAIN_CACHE", str(tmp_path))
    torch.manual_seed(7)
    wanted = torch.randn(3)
    torch.manual_seed(7)
    folder = nano.ensure_nano_folder("nano-base")
    assert torch.equal(torch.randn(3), wanted)
    first, second = (load_file(path / "model.safetensors") for path in (model.path, folder))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("nano", "nano-base"):
        texts = (
            load_file(nano.ensure_nano_folder(name) / "t5gemma" / "model.safetensors"),
            load_file(model.path / TEXT),
        )
        assert all(torch.equal(texts[0][key], texts[1][key]) for key in texts[1])
    assert (folder / "model.safetensors").stat().st_mode & 0o044 == 0o044
    assert (folder / "t5gemma" / "model.safetensors").stat().st_mode & 0o044 == 0o044


def write_assets(assets: Path, model: StableAudio3) -> dict[str, torch.Tensor]:
    """Stand-ins for the shipped weights, version 7; the post-trained model differs in one tensor."""
    source = load_file(model.path / "model.safetensors")
    shutil.copytree(nano.ASSETS / "t5gemma", assets / "t5gemma")
    (assets / "version.txt").write_text("7\n")
    same = {name: tensor for name, tensor in source.items() if name.startswith("pretransform.")}
    rest = {name: tensor for name, tensor in source.items() if name not in same}
    save_file(same, assets / "autoencoder.safetensors")
    save_file(rest, assets / "nano-base.safetensors")
    save_file({**rest, OUT: rest[OUT] * 2}, assets / "nano.safetensors")
    return rest


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path, model: StableAudio3) -> None:
    write_assets(tmp_path / "assets", model)
    script = (
        "import sys; from pathlib import Path; from sa3train.models import checkpoint, nano; "
        "nano.ASSETS = Path(sys.argv[1]); checkpoint.load_checkpoint('nano'); "
        "heavy = {'torch._dynamo', 'transformers', 'huggingface_hub'} & set(sys.modules); "
        "assert not heavy, f'loading imports {heavy}'"
    )
    environment = {"SA3TRAIN_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}

    def run(_: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, str(tmp_path / "assets")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(2) as pool:
        for finished in pool.map(run, range(2)):
            assert finished.returncode == 0, finished.stderr
    assert [path.name[:2] for path in (tmp_path / "nano").iterdir()] == ["7-"]


def test_losing_the_race_keeps_the_first_ones_files(tmp_path: Path) -> None:
    aside, final = tmp_path / "aside", tmp_path / "final"
    for folder in (aside, final):
        folder.mkdir()
        (folder / "who").write_text(folder.name)
    nano._rename(aside, final)
    assert (final / "who").read_text() == "final"


def test_an_unwritable_cache_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("SA3TRAIN_CACHE", str(blocker / "cache"))
    with pytest.raises(SA3Error, match=r"cannot write nano to .*set SA3TRAIN_CACHE"):
        nano.ensure_nano_folder("nano")


def test_an_installation_without_weights_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano, "ASSETS", tmp_path)
    with pytest.raises(SA3Error, match=r"contains no weights of nano\. Reinstall"):
        load_checkpoint("nano")


def test_another_version_is_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: StableAudio3
) -> None:
    assets = tmp_path / "assets"
    rest = write_assets(assets, model)
    monkeypatch.setattr(nano, "ASSETS", assets)
    monkeypatch.setenv("SA3TRAIN_CACHE", str(tmp_path / "cache"))
    trained = load_checkpoint("nano")
    assert trained.path.match(f"{tmp_path}/cache/nano/7-*/nano")
    assert torch.equal(trained.dit.get_parameter("transformer.project_out.weight"), rest[OUT].float() * 2)
    assert load_checkpoint("nano-base").fingerprint() != trained.fingerprint()
    assert trained.conditioner(["hum"], [3.0]).cross_attn_cond_BLD.isfinite().all()
