"""The recipe on a corpus of effects alone, which needs no FluidSynth: from the linear start to a distilled step."""

import random
from pathlib import Path

import autoencoder
import base
import corpus
import decoder
import distill
import effects
import encoder
import latents
import numpy as np
import parts
import pytest
import sounds
import speed
import store
import targets
import text
import torch
import vocoder
import watch
from composer import make_plan
from safetensors.torch import save_file

from sa3train.files import write_json
from sa3train.models import linear_code


def clips(count: int) -> list[corpus.Clip]:
    rng = random.Random(0)
    made = []
    for number in range(count):
        plan = make_plan(rng, sounds.EFFECTS[number % len(sounds.EFFECTS)], seconds=(1.0, 3.0))
        audio = corpus.finish(plan, effects.make_effect(plan))
        made.append(corpus.Clip(plan, audio, corpus.captions(plan, rng, 3)))
    return made


CAP = parts.Cap(12, 8, 6, 0.5, 1.0)


@pytest.fixture
def plain_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compilation: a test runs each shape once. Short batches, and a judge of a few clips."""
    for module in (base, encoder):
        for name in ("fast_cpu_blocks", "fast_cpu_layers"):
            monkeypatch.setattr(module, name, lambda layers: None, raising=False)
    monkeypatch.setattr(base, "SHORT", (CAP,))
    monkeypatch.setattr(base.Run, "validate", lambda self, corpus: 0.0)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with a store of 16 clips for both splits, a scaled autoencoder and latents."""
    folder = tmp_path_factory.mktemp("nano")
    for split in ("train", "val"):
        (folder / split).mkdir()
        firsts, entries, parts_ = 0, [], []
        for clip in clips(16):
            entries.append(store.describe(clip, firsts))
            parts_.append(np.round(clip.audio.T * 32767).astype(np.int16))
            firsts += clip.audio.shape[1]
        np.save(folder / split / "0.npy", np.concatenate(parts_))
        write_json(folder / split / "0.json", entries)
    torch.manual_seed(0)
    crops = autoencoder.Crops(store.Store(folder / "train"), 0).batch(60)
    patches = crops.unflatten(-1, (-1, 16, 256)).permute(0, 2, 3, 1, 4).flatten(0, 1).flatten(2)
    model = autoencoder.build()
    state = model.state_dict()
    linear_code.start_linear(state, linear_code.fit(patches))
    model.load_state_dict(state)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "ae.safetensors")
    for name in ("linear", "latents"):
        (folder / name).mkdir()
    frozen = latents.freeze(folder)
    for split in ("train", "val"):
        kept = store.Store(folder / split)
        linear = latents.encode_chunk(frozen, kept, range(16))
        torch.save(linear, folder / "linear" / f"{split}-0.pt")
        if split == "train":
            code = {name: tensor.contiguous() for name, tensor in targets.fit(kept, linear).items()}
            save_file(code, folder / "code.safetensors")
        made = [targets.latents_of(code, targets.clip(kept, i, z.shape[1]), z).half() for i, z in enumerate(linear)]
        torch.save(made, folder / "latents" / f"{split}-0.pt")
    return folder


def test_store_gives_back_what_was_written(work: Path) -> None:
    kept = store.Store(work / "train")
    for index, clip in enumerate(clips(16)):
        np.testing.assert_allclose(kept.audio(index), clip.audio, atol=1 / 32000)
    assert kept.audio(3, 100, 50).shape == (2, 50)
    with pytest.raises(FileNotFoundError, match=r"store\.py"):
        store.Store(work / "none")


def test_linear_start_is_a_code_already() -> None:
    """Smooth noise, which 62 components a quarter hold almost wholly, comes back from the untrained transformers."""
    torch.manual_seed(0)
    spectrum = torch.fft.rfft(torch.randn(40, 2, 4 * 4096))
    spectrum[..., int(500 / 44100 * 4 * 4096) :] = 0
    audio = torch.fft.irfft(spectrum)
    audio = 0.1 * audio / audio.std()
    model = autoencoder.build()
    state = model.state_dict()
    patches = audio.unflatten(-1, (-1, 16, 256)).permute(0, 2, 3, 1, 4).flatten(0, 1).flatten(2)
    linear_code.start_linear(state, linear_code.fit(patches))
    model.load_state_dict(state)
    with torch.no_grad():
        made = model.decode(model.encode(audio), noise=False)
    assert autoencoder.si_sdr(audio, made) > 12


def test_scaling_keeps_the_code(work: Path) -> None:
    """Folding mean and spread into bottleneck and decoder changes the latents, not what comes out."""
    model = autoencoder.build()
    model.load_state_dict(latents.freeze(work).state_dict())
    audio = autoencoder.Crops(store.Store(work / "train"), 1).batch(8)
    with torch.no_grad():
        before = model.decode(model.encode(audio, noise=False), noise=False)
        latents.set_scale(model, audio)
        z_BCT = model.encode(audio, noise=False)
        after = model.decode(z_BCT, noise=False)
    # Noise of the new tokens differs from call to call only with noise=True; here both are exact.
    assert float((before - after).abs().max()) < 2e-3
    assert float(z_BCT.mean((0, 2)).abs().max()) < 1e-2
    alive = z_BCT.std((0, 2)) > 1e-2
    assert 0.5 < float(z_BCT[:, alive].std()) < 1.5


def test_the_short_way_encodes_alike(work: Path) -> None:
    model, kept = latents.freeze(work), store.Store(work / "val")
    for long, short in zip(latents.load(work, "val"), latents.encode_linear(model, kept, range(16)), strict=True):
        assert long.shape == short.shape
        assert float((long - short).float().square().mean() / long.float().square().mean()) < 0.1


def test_autoencoder_step_learns_from_all_terms(work: Path) -> None:
    model = latents.freeze(work).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    terms = autoencoder.step_loss(model, autoencoder.Crops(store.Store(work / "train"), 0).batch(4), 0.15, generator)
    terms["total"].backward()
    assert all(torch.isfinite(term) for term in terms.values())
    gradients = [p.grad for p in model.decoder.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_tokenizer_writes_any_text() -> None:
    tokenizer = text.train_tokenizer(["solo piano, slow", "A bright marimba at 120 BPM."] * 20)
    assert len(tokenizer) <= text.PIECES
    for words in ("solo piano", "Ünknown wörds ♫"):
        assert tokenizer.decode(tokenizer(words).input_ids).strip() == words
    assert len(tokenizer("solo piano, slow").input_ids) < 8


def test_latents_hold_envelope_and_waveform(work: Path) -> None:
    """The two parts are undone by their back maps, the latents of silence are those of a silent clip."""
    code = targets.load_code(work)
    kept, linear = store.Store(work / "val"), latents.load(work, "val")
    audio = targets.clip(kept, 0, linear[0].shape[1])
    z_CT = targets.latents_of(code, audio, linear[0])
    assert z_CT.shape == (targets.LATENT, linear[0].shape[1])
    energies = targets.envelope(audio[None])[0]
    back = code["envelope_back"] @ z_CT[: targets.ENVELOPE] + code["envelope_mean"][:, None]
    assert float((back - energies).square().mean().sqrt()) < 0.1 * float(energies.std())
    quiet = targets.envelope(torch.zeros(1, 2, 8192))[0] - code["envelope_mean"][:, None]
    expected = code["envelope"] @ quiet
    torch.testing.assert_close(targets.silence(code)[: targets.ENVELOPE], expected[:, 0], atol=1e-4, rtol=1e-4)


def test_envelope_follows_level_and_side() -> None:
    time = torch.arange(4 * 4096) / 44100
    tone = torch.sin(2 * torch.pi * 1000 * time)
    mono, wide = torch.stack([tone, tone]), torch.stack([tone, -tone])
    loud, quiet, side = targets.envelope(torch.stack([mono, 0.1 * mono, wide])).mean(-1)
    torch.testing.assert_close(quiet.max() / loud.max(), torch.tensor(0.1 ** (2 * targets.POWER)), atol=0.01, rtol=0.01)
    assert float(side[-targets.SIDE_BANDS :].max()) > 0.5 > float(loud[-targets.SIDE_BANDS :].max())


def test_decoder_starts_as_a_vocoder(work: Path) -> None:
    """Set by hand, it gives each band about its energy back, and every loss term is finite."""
    model = decoder.first(work)
    latents_BCT, audio_BCN = decoder.Pairs(work, "train", 0).batch(8)
    with torch.no_grad():
        real, made = (targets.envelope(each) for each in (audio_BCN, model.decode(latents_BCT)))
    assert float((real - made).abs().mean()) < 0.5 * float((real - real.mean()).abs().mean())
    terms = decoder.step_loss(model, latents_BCT, audio_BCN, 0.2, torch.Generator().manual_seed(0))
    terms["total"].backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert (work / "vocoder.pt").exists()


def test_amplitudes_follow_levels() -> None:
    """The hand-set curve of SiLUs undoes the compression within 2 dB over 70 dB."""
    thresholds, weights = vocoder.expansion()
    level = torch.linspace(0.08, 1.0, 50)
    made = (torch.nn.functional.silu(vocoder.STEEP * (level[:, None] - thresholds)) * weights).sum(1) / vocoder.GAIN
    assert float((20 * (made / level ** (0.5 / targets.POWER)).log10()).abs().max()) < 2


def test_encoder_learns_the_latents(work: Path, plain_speed: None) -> None:
    run = encoder.Run(work, 1, 1e-3, cool=False)
    pairs = decoder.Pairs(work, "train", 0)
    before = float(run.errors(pairs)[0].mean().detach())
    for _ in range(8):
        for optimizer in run.optimizers:
            optimizer.zero_grad(set_to_none=True)
        run.errors(pairs, 4)[0].mean().backward()
        for optimizer in run.optimizers:
            optimizer.step()
    assert float(run.errors(pairs)[0].mean().detach()) < before


def test_base_trains_saves_and_resumes(work: Path, plain_speed: None) -> None:
    run = base.Run(work, 1 / 60, 1e-3)
    run.train()
    assert (work / "base.pt").exists()
    assert run.step >= 1
    again = base.Run(work, 1 / 60, 1e-3)
    assert again.step == run.step
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    again.train()  # the minutes are over: nothing more to do
    assert again.step == run.step
    cooled = base.Run(work, 1 / 60, 1e-3, cool=True)
    assert cooled.share() == 1
    cooled.train()
    assert cooled.share() == 0.01
    assert base.Run(work, 1 / 60, 1e-3).step == run.step < cooled.step


def test_batches_are_masked_and_cut(work: Path) -> None:
    corpus_ = parts.Corpus(work, "val", parts.tokenizer_of(work), torch.zeros(targets.LATENT))
    batch = corpus_.batch(list(range(8)), CAP, random.Random(0))
    assert batch.latents_BCT.shape == (8, targets.LATENT, 12 + 6)
    assert int(batch.frames_B.max()) <= 12
    assert (batch.real_BT.sum(1) >= batch.frames_B).all()
    cut = batch.frames_B == 12
    torch.testing.assert_close(batch.seconds_B[cut], torch.full((int(cut.sum()),), 12 / parts.FRAMES_PER_SECOND))
    after = torch.arange(12 + 6)[None] >= batch.frames_B[:, None]
    assert not batch.latents_BCT.mT[after].any()


def test_fast_blocks_compute_the_same() -> None:
    """Dense short attention and plain norms against the library's, on a padded batch."""
    from sa3train.models import blocks
    from sa3train.models.patterns import Padded

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 9, 4, 64).unbind()
    mask = torch.arange(9)[None] < torch.tensor([[9], [5]])
    expected = blocks.attend(q, k, v, Padded(mask))
    made = speed._attend_short(q, k, v, Padded(mask))
    assert float((made.float() - expected).abs().max()) < 0.03
    norm = blocks.RMSNorm(32)
    x, scale, shift = torch.randn(3, 2, 5, 32).unbind()
    torch.testing.assert_close(speed._norm(norm, x), norm(x))
    torch.testing.assert_close(speed._modulated(norm, x, scale, shift), norm.modulated(x, scale, shift))


def test_distillation_walks_and_learns(work: Path) -> None:
    torch.manual_seed(0)
    tokenizer = parts.tokenizer_of(work)
    model = parts.Nano(len(tokenizer)).requires_grad_(False)
    batch = parts.Corpus(work, "val", tokenizer, torch.zeros(targets.LATENT)).batch([0, 1], CAP, random.Random(0))
    walks = distill.walk(model, batch, torch.Generator().manual_seed(0))
    assert walks.points_KBCT.shape == (distill.WALK_STEPS, *batch.latents_BCT.shape)
    assert torch.isfinite(walks.ends_BCT).all()
    student = model.dit.requires_grad_(True)
    distill.lesson(student, walks, torch.Generator().manual_seed(0)).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in student.parameters())


def test_judging_needs_no_decoder(work: Path) -> None:
    torch.manual_seed(0)
    tokenizer = parts.tokenizer_of(work)
    model = parts.Nano(len(tokenizer)).eval()
    made = watch.sample(model, tokenizer, ["wind", "impact"], 1.0, cfg=3.0, steps=2)
    assert made.shape == (2, targets.LATENT, round(parts.FRAMES_PER_SECOND) + 20)
    features = [watch.statistics(targets.load_code(work), z_CT) for z_CT in made]
    assert features[0].shape == features[1].shape
    assert torch.isfinite(torch.stack(features)).all()
