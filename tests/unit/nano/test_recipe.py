"""The recipe on a corpus of effects alone, which needs no FluidSynth: from computed latents to a distilled step."""

import random
from pathlib import Path

import base
import channels
import classifier
import corpus
import decoder
import distill
import effects
import encoder
import fitted
import numpy as np
import parts
import pytest
import sound_losses
import sounds
import speed
import store
import targets
import text
import torch
import vocoder
import watch
import waves
import wiring
from composer import make_plan
from safetensors.torch import save_file

from helpers.audio import noise, tone
from sa3train.core.files import write_json
from sa3train.evaluation.classifier import Classifier, compute_features
from sa3train.models.autoencoder import Autoencoder


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
    """No compilation: a test runs each shape once. Short batches, and a classifier of a few clips."""
    monkeypatch.setattr(base, "fast_cpu_blocks", lambda layers: None)
    monkeypatch.setattr(base, "SHORT", (CAP,))
    monkeypatch.setattr(base.Run, "validate", lambda self, corpus: 0.0)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with a store of 16 clips for both splits and their latents."""
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
    (folder / "latents").mkdir()
    for split in ("train", "val"):
        kept = store.Store(folder / split)
        audio = [targets.clip(kept, index) for index in range(16)]
        if split == "train":
            code = {name: tensor.contiguous() for name, tensor in targets.fit(audio).items()}
            save_file(code, folder / "code.safetensors")
        torch.save([targets.latents_of(code, each).half() for each in audio], folder / "latents" / f"{split}-0.pt")
    return folder


def test_store_gives_back_what_was_written(work: Path) -> None:
    kept = store.Store(work / "train")
    for index, clip in enumerate(clips(16)):
        np.testing.assert_allclose(kept.audio(index), clip.audio, atol=1 / 32000)
    assert kept.audio(3, 100, 50).shape == (2, 50)
    with pytest.raises(FileNotFoundError, match=r"store\.py"):
        store.Store(work / "none")


def test_tokenizer_writes_any_text() -> None:
    tokenizer = text.train_tokenizer(["solo piano, slow", "A bright marimba at 120 BPM."] * 20)
    assert len(tokenizer) <= text.VOCABULARY_SIZE
    for words in ("solo piano", "Ünknown wörds ♫"):
        assert tokenizer.decode(tokenizer(words).input_ids).strip() == words
    assert len(tokenizer("solo piano, slow").input_ids) < 8


def test_latents_hold_what_their_back_maps_undo(work: Path) -> None:
    code = targets.load_code(work)
    audio = targets.clip(store.Store(work / "val"), 0)
    z_CT = targets.latents_of(code, audio)
    assert z_CT.shape == (targets.LATENT, audio.shape[1] // targets.FRAME)
    parts_ = {"envelope": targets.envelope(audio[None])[0], "tones": targets.tones(audio)}
    rows = {"envelope": slice(targets.ENVELOPE), "tones": slice(targets.ENVELOPE + targets.WAVE, None)}
    for name, values in parts_.items():
        back = code[f"{name}_back"] @ z_CT[rows[name]] + code[f"{name}_mean"][:, None]
        assert float((back - values).square().mean().sqrt()) < 0.1 * float(values.std())


def test_silence_is_the_latent_of_silence(work: Path) -> None:
    code = targets.load_code(work)
    quiet = targets.latents_of(code, torch.zeros(2, 4 * targets.FRAME))
    torch.testing.assert_close(quiet, targets.silence(code)[:, None].expand(-1, 4), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("key", [60, 69, 76, 88])
def test_a_partial_is_the_share_of_its_semitone(key: int) -> None:
    time = torch.arange(4 * targets.FRAME) / targets.RATE
    tone = 0.2 * torch.sin(2 * torch.pi * 440 * 2 ** ((key - 69) / 12) * time)
    shares = targets.tones(torch.stack([tone, tone]))[:, 1:-1]
    assert (shares.argmax(0) == key - targets.LOWEST_KEY).all()
    assert not targets.tones(torch.zeros(2, 2 * targets.FRAME)).any()


def test_bass_passes_below_and_stops_above() -> None:
    time = torch.arange(8 * targets.FRAME) / targets.RATE
    for hertz, least, most in ((100, 0.99, 1.01), (1000, 0.0, 0.001)):
        tone = torch.sin(2 * torch.pi * hertz * time)
        passed = targets.bass(torch.stack([tone, tone]))[0, targets.FRAME : -targets.FRAME]
        assert least <= float(passed.std() / tone.std()) <= most


def test_envelope_follows_level_and_side() -> None:
    time = torch.arange(4 * 4096) / 44100
    tone = torch.sin(2 * torch.pi * 1000 * time)
    mono, wide = torch.stack([tone, tone]), torch.stack([tone, -tone])
    loud, quiet, side = targets.envelope(torch.stack([mono, 0.1 * mono, wide])).mean(-1)
    torch.testing.assert_close(quiet.max() / loud.max(), torch.tensor(0.1 ** (2 * targets.POWER)), atol=0.01, rtol=0.01)
    assert float(side[-targets.SIDE_BANDS :].max()) > 0.5 > float(loud[-targets.SIDE_BANDS :].max())


@pytest.mark.slow
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


@torch.no_grad()
@pytest.mark.slow
def test_an_eighth_of_the_stretches_is_silence_and_asks_for_silence(work: Path) -> None:
    model = decoder.first(work)
    latents_BCT, audio_BCN = decoder.Pairs(work, "train", 0).batch(16)
    silent = audio_BCN.abs().amax((1, 2)) == 0
    assert silent[-2:].all()
    wanted = targets.silence(targets.load_code(work))[:, None].expand(-1, decoder.FRAMES)
    torch.testing.assert_close(latents_BCT[-1], wanted)
    terms = decoder.step_loss(model, latents_BCT[-2:], audio_BCN[-2:], 0.2, torch.Generator().manual_seed(0))
    louder = decoder.step_loss(model, latents_BCT[-2:] + 1, audio_BCN[-2:], 0.2, torch.Generator().manual_seed(0))
    assert 0 < float(terms["hum"]) < float(louder["hum"])
    heard = decoder.step_loss(model, latents_BCT[:2], audio_BCN[:2] + 1e-3, 0.2, torch.Generator().manual_seed(0))
    assert float(heard["hum"]) == 0


def test_a_semitone_comes_back_as_its_partial(work: Path) -> None:
    """A steady tone in, its latents, and the hand-set oscillator plays the same note without a seam between frames."""
    code, model = targets.load_code(work), decoder.first(work)
    time = torch.arange(8 * targets.FRAME) / targets.RATE
    tone = 0.2 * torch.sin(2 * torch.pi * 880 * time)
    with torch.no_grad():
        made = model.decode(targets.latents_of(code, torch.stack([tone, tone]))[None])[0, 0]
    middle = made[2 * targets.FRAME : 6 * targets.FRAME]
    power = torch.fft.rfft(middle).abs().square()
    peak = int(power.argmax())
    assert abs(peak * targets.RATE / len(middle) - 880) < 6
    near = power[peak - 8 : peak + 9].sum()
    assert float(near / power.sum()) > 0.8


def alike(model: Autoencoder, latents_CT: torch.Tensor) -> float:
    """Correlation of two decodings above 500 Hz."""
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with torch.no_grad():
            audio_N = model.decode(latents_CT[None])[0, 0]
        made.append((audio_N - targets.bass(torch.stack([audio_N, audio_N]))[0])[targets.FRAME : -targets.FRAME])
    return float(torch.corrcoef(torch.stack(made))[0, 1])


def test_noise_comes_back_as_noise_and_a_chord_does_not(work: Path) -> None:
    """Two decodings of noise have nothing in common, two of a chord most."""
    code, model = targets.load_code(work), decoder.first(work)
    noise = 0.1 * torch.randn(2, 8 * targets.FRAME, generator=torch.Generator().manual_seed(0))
    time = torch.arange(8 * targets.FRAME) / targets.RATE
    tone = sum(0.1 * torch.sin(2 * torch.pi * 440 * 2 ** (key / 12) * time) for key in (3, 10, 15, 22, 27))
    assert abs(alike(model, targets.latents_of(code, noise))) < 0.2
    assert alike(model, targets.latents_of(code, torch.stack([tone, tone]))) > 0.6


@pytest.mark.slow
@torch.no_grad()
def test_levels_are_matched_and_silence_stays(work: Path) -> None:
    """Bands at a third of their amplitude get much of it back, and silence stays as it is."""
    code, model = targets.load_code(work), decoder.first(work)
    latents_BCT, audio_BCN = decoder.Pairs(work, "train", 0).batch(12, seen=0.0)
    heard = audio_BCN.square().mean((1, 2)) > 1e-6

    def level() -> float:
        made_BCN = model.decode(latents_BCT[heard], generator=torch.Generator().manual_seed(0))
        return float((made_BCN.square().sum((1, 2)) / audio_BCN[heard].square().sum((1, 2))).log10().median() * 10)

    quiet_BCT = targets.silence(code)[None, :, None].repeat(1, 1, 8)
    hum = model.decode(quiet_BCT, noise=False).square().mean()
    fitted._scale_bands(model, torch.full((channels.BANDS,), 1 / 3), torch.zeros(3 * wiring.D))
    before = level()
    fitted.match_levels(model, code, latents_BCT[heard], audio_BCN[heard])
    after = level()
    assert abs(after) < 0.6 * abs(before), (before, after)
    assert float(model.decode(quiet_BCT, noise=False).square().mean()) < 2 * float(hum) + 1e-9


@pytest.mark.slow
def test_bass_is_joined_across_patches(work: Path) -> None:
    """The fitted mapping comes nearer to the bass of clips than patches cut at their edges do."""
    code, pairs = targets.load_code(work), decoder.Pairs(work, "train", 0).batch(12)
    cut, joined = vocoder.start(code), vocoder.start(code)
    fitted.join_bass(joined, code, *pairs)

    def error(model: Autoencoder) -> float:
        with torch.no_grad():
            made = model.decode(pairs[0], noise=False)
        both = zip(pairs[1], made, strict=True)
        return float(sum((targets.bass(real) - targets.bass(out)).square().sum() for real, out in both))

    assert error(joined) < error(cut)


def test_texture_is_of_noise_not_of_its_samples() -> None:
    """Another draw of the same noise is near, a hum of the same spectrum in the mean is not, and silence is finite."""
    draws = 0.1 * torch.randn(2, 32768, generator=torch.Generator().manual_seed(0))
    level_B = torch.full((1,), 0.1)
    steady = draws[0, :1024].repeat(32)
    near = sound_losses.texture_loss(draws[:1], draws[1:], 2048, level_B)
    far = sound_losses.texture_loss(draws[:1], steady[None], 2048, level_B)
    assert float(near) < 0.4 * float(far)
    assert torch.isfinite(sound_losses.texture_loss(torch.zeros(1, 32768), draws[1:], 2048, level_B * 0 + 1e-3))


@pytest.mark.slow
def test_places_are_found_in_both_frames_of_a_chunk() -> None:
    factors, weights, constant = waves.fit_place()
    theta = 10000.0 ** (-torch.arange(16) / 16)

    def seen(back: torch.Tensor) -> torch.Tensor:
        angle = back[:, None] * theta
        return (torch.cat([angle.cos(), angle.sin()], 1) @ factors.T).exp()

    back = torch.arange(1, 17).float()
    for shift in (-17, 17):
        share = seen(back) + seen(back + shift)
        place = (share / (share + 32)) @ weights + constant
        torch.testing.assert_close(place, torch.arange(16) - 7.5, atol=0.01, rtol=0)


def test_training_leaves_what_is_set_by_hand(work: Path) -> None:
    model = decoder.first(work)
    before = {name: tensor.clone() for name, tensor in model.decoder.state_dict().items()}
    optimizer = decoder.decoder_optimizers(model, 1e-3)[0]
    terms = decoder.step_loss(model, *decoder.Pairs(work, "train", 0).batch(4), 0.2, torch.Generator().manual_seed(0))
    terms["total"].backward()
    optimizer.step()
    free = {name: mask for name, _, mask in decoder.learning(model)}
    moved = 0
    for name, tensor in model.decoder.state_dict().items():
        changed = tensor != before[name]
        assert not (changed & (free.get(name, torch.zeros_like(tensor)) == 0)).any(), name
        moved += int(changed.sum())
    assert moved > 100_000


def test_amplitudes_follow_levels() -> None:
    """The hand-set curve of SiLUs undoes the compression within 2 dB over 70 dB."""
    thresholds, weights = waves.expansion()
    level = torch.linspace(0.08, 1.0, 50)
    made = (torch.nn.functional.silu(channels.STEEP * (level[:, None] - thresholds)) * weights).sum(1) / channels.GAIN
    assert float((20 * (made / level ** (0.5 / targets.POWER)).log10()).abs().max()) < 2


def test_encoder_is_wired_to_see_bands_and_semitones() -> None:
    """A tone of A5 at amplitude 0.2 arrives in the token as three steps and a slope of 9: in its semitone, and in
    its band.
    """
    time = torch.arange(8 * targets.FRAME) / targets.RATE
    tone = 0.2 * torch.sin(2 * torch.pi * 880 * time)
    token = encoder.frame_tokens(encoder.start(), torch.stack([tone, tone]))[3]
    high = encoder.TREBLE + targets.MID_BANDS + targets.SIDE_BANDS
    heard = 0
    for head, fetched in enumerate(encoder._fetched()):
        levels = {channel: float(token[64 * head + index]) for index, channel in enumerate(fetched)}
        bands = [levels[channel] for channel in fetched[: targets.MID_BANDS]]
        centre = float(targets.band_centres(targets.MID_BANDS)[max(range(len(bands)), key=bands.__getitem__)])
        assert abs(centre - 880) < 150
        wanted = high + 81 - targets.LOWEST_KEY - encoder.LOW_TONES
        if wanted in levels:
            heard += 1
            assert (levels[wanted] - 3) / 9 == pytest.approx(0.2, rel=0.1)
            assert levels[wanted] == max(value for channel, value in levels.items() if channel >= high)
    assert heard == 2


def test_encoder_is_learned(work: Path) -> None:
    model = encoder.start()
    x_FD, z_FC = encoder.pairs(model, work, "train", 16)
    assert len(x_FD) == len(z_FC)
    head = encoder.Head(model)
    before = encoder.missed(head, x_FD, z_FC)
    encoder.solve(head, x_FD, z_FC)
    solved = encoder.missed(head, x_FD, z_FC)
    encoder.learn(head, x_FD, z_FC, targets.load_code(work)["envelope_back"], 40)
    learned = encoder.missed(head, x_FD, z_FC)
    assert all(learned[name] < solved[name] < before[name] for name in solved)
    assert learned["wave"] < 0.1
    audio = targets.clip(store.Store(work / "train"), 0)
    made = model.encode(audio[None], noise=False)[0].T
    torch.testing.assert_close(made, head(x_FD[: len(made)]), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
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
    from sa3train.models import blocks, norms
    from sa3train.models.attention import Padded

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 9, 4, 64).unbind()
    mask = torch.arange(9)[None] < torch.tensor([[9], [5]])
    expected = blocks.attend(q, k, v, Padded(mask))
    made = speed._attend_short(q, k, v, Padded(mask))
    assert float((made.float() - expected).abs().max()) < 0.03
    norm = norms.RMSNorm(32)
    x, gain, shift = torch.randn(3, 2, 5, 32).unbind()
    torch.testing.assert_close(speed._norm(norm, x), norm(x))
    torch.testing.assert_close(speed._modulated(norm, x, gain, shift), norm.modulate(x, gain, shift))


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


def test_the_classifier_learns_and_is_kept(tmp_path: Path) -> None:
    tones = [tone(0.5, 100.0 + 40 * number, channels=1) for number in range(12)]
    heard = [torch.from_numpy(clip.T) for clip in (*tones, *(noise(0.5, seed=number) for number in range(12)))]
    rows = torch.stack([compute_features(clip, 44100) for clip in heard])
    made = classifier.train_classifier(rows, torch.tensor([0] * 12 + [1] * 12), ["tone", "noise"], epochs=15)
    others = (tone(0.5, 333.0), noise(0.5, seed=99))
    assert [made.classify(torch.from_numpy(clip.T), 44100) for clip in others] == ["tone", "noise"]
    made.save(tmp_path / "c.safetensors")
    again = Classifier.load(tmp_path / "c.safetensors")
    assert again.names == ["tone", "noise"]
    torch.testing.assert_close(again.predict(heard[0], 44100), made.predict(heard[0], 44100), atol=0.02, rtol=0)
