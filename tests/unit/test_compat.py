"""Code written for the released project: every kind of call that its documents show, with another import."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from helpers.audio import tone, write_clip
from helpers.golden import GOLDEN
from sa3train.compat import AutoencoderModel, StableAudioModel
from sa3train.core.errors import ConfigError, GenerationError

pytestmark = pytest.mark.slow
LEARNED = Path(__file__).parents[2] / "sa3train" / "assets" / "nano" / "learned"
RATE = 44100
QUICK: dict[str, Any] = {"steps": 1, "seed": 3, "duration": 1}


@pytest.fixture(scope="module")
def model() -> StableAudioModel:
    return StableAudioModel.from_pretrained("nano", device="cpu")


@pytest.fixture(scope="module")
def base() -> StableAudioModel:
    return StableAudioModel.from_pretrained("nano-base", device="cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> StableAudioModel:
    """Medium's kind and longest duration, with random weights."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-medium"
    shutil.copytree(GOLDEN / "diff", folder)
    longest = json.loads((GOLDEN / "configs" / "medium.json").read_text())["sample_size"]
    config = json.loads((folder / "model_config.json").read_text())
    (folder / "model_config.json").write_text(json.dumps({**config, "sample_size": longest}))
    return StableAudioModel.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, int]:
    """What `torchaudio.load` returns where torchcodec is installed."""
    path = write_clip(tmp_path_factory.mktemp("audio") / "audio.wav", tone(2.0))
    samples, rate = soundfile.read(path, dtype="float32")
    return torch.from_numpy(samples.T.copy()), rate


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], bool]]:
    with caplog.at_level(logging.WARNING):
        yield lambda text: any(text in record.getMessage() for record in caplog.records)


def test_the_first_example_of_the_documents(model: StableAudioModel, warned: Callable[[str], bool]) -> None:
    settings: dict[str, Any] = {**QUICK, "cfg_scale": 1, "batch_size": 1}
    audio = model.generate(prompt="koto, slow melody", negative_prompt="poor quality", **settings)
    assert audio.shape == (1, 2, RATE)
    assert audio.abs().max() <= 1
    assert warned("negative_prompt: no effect with cfg_scale=1")
    assert torch.equal(audio, model.generate(prompt="koto, slow melody", **settings))
    assert not torch.equal(audio, model.generate(**settings)), "without a prompt the text is empty"


def test_durations_of_medium_and_defaults(tiny: StableAudioModel, warned: Callable[[str], bool]) -> None:
    assert tiny.generate(prompt="a", steps=1).shape == (1, 2, 120 * RATE)
    assert tiny.generate(prompt="a", duration=250, steps=1).shape == (1, 2, 250 * RATE)
    assert tiny._limit_duration([500, 3]) == [pytest.approx(380.4, abs=0.1), 3]
    assert warned("is limited to the 380.4 s")


def test_defaults_are_those_of_the_documents(base: StableAudioModel) -> None:
    """8 steps without guidance, also on a base model."""
    quick: dict[str, Any] = {"prompt": "koto", "duration": 1, "seed": 3}
    assert torch.equal(base.generate(**quick), base.generate(**quick, steps=8, cfg_scale=1.0))
    expected = base.generator.generate("koto", duration=1, seed=3, steps=8, cfg_scale=1.0).audio[0]
    assert torch.equal(base.generate(**quick)[0], expected)


def test_audio_to_audio(model: StableAudioModel, audio: Any) -> None:
    """The documents have (sample_rate, tensor), `torchaudio.load` returns (tensor, sample_rate)."""
    init_audio = audio[::-1]
    result = model.generate(init_audio=init_audio, init_noise_level=0.9, prompt="bossa nova", **QUICK)
    expected = model.generator.generate("bossa nova", init_audio=audio, init_noise_level=0.9, **QUICK).audio[0]
    assert torch.equal(result[0], expected)
    whole = model.generate(init_audio=init_audio, prompt="bossa nova", **QUICK)
    assert not torch.equal(whole, result), "init_noise_level is 1 by default"


@pytest.mark.parametrize(("dtype", "channels"), [(np.int16, 2), (np.int32, 1)])
def test_audio_as_gradio_gives_it(model: StableAudioModel, audio: Any, dtype: Any, channels: int) -> None:
    """(samples, channels) whole numbers; a mono clip has one axis."""
    same = audio[0][:channels]
    scaled = (same.double() * np.iinfo(dtype).max).round().numpy().astype(dtype)
    settings: dict[str, Any] = {**QUICK, "init_noise_level": 0.5, "return_latents": True}
    result = model.generate("koto", init_audio=(RATE, scaled.T if channels == 2 else scaled[0]), **settings)
    expected = model.generate("koto", init_audio=(same, RATE), **settings)
    assert (result - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize(("start", "end"), [(0.5, 1.0), ([0.2, 0.7], [0.4, 0.9])])
def test_inpainting(model: StableAudioModel, audio: Any, start: Any, end: Any) -> None:
    times = {"inpaint_mask_start_seconds": start, "inpaint_mask_end_seconds": end}
    result = model.generate(inpaint_audio=audio, **times, prompt="kick drum fill", **QUICK)
    assert torch.equal(
        result[0], model.generator.generate("kick drum fill", inpaint_audio=audio, **times, **QUICK).audio[0]
    )


def test_continuation_beyond_the_duration(model: StableAudioModel, audio: Any, warned: Callable[[str], bool]) -> None:
    """The released project cuts a region to the duration."""
    settings: dict[str, Any] = {**QUICK, "inpaint_audio": audio, "inpaint_mask_start_seconds": 0.5}
    result = model.generate("dream", **settings, inpaint_mask_end_seconds=18.0)
    assert warned("cut to the duration of 1 s")
    assert torch.equal(result, model.generate("dream", **settings, inpaint_mask_end_seconds=1.0))
    assert model.generate("dream", **settings).shape == result.shape
    assert warned("have an effect together only")


def test_values_per_item(model: StableAudioModel, audio: Any) -> None:
    """Lists of prompts, negative prompts and durations; shorter items end in silence."""
    result = model.generate(
        inpaint_audio=audio,
        inpaint_mask_start_seconds=0.3,
        inpaint_mask_end_seconds=0.8,
        prompt=["one", "two", "three", "four"],
        negative_prompt=["noise", "hum", "clicks", "hiss"],
        duration=np.array([2, 1.5, 1, 1]),
        steps=1,
        cfg_scale=3,
        batch_size=4,
    )
    assert result.shape == (4, 2, 2 * RATE)
    assert result[2, :, RATE:].abs().max() == 0 < result[0, :, RATE:].abs().max()


def test_padding_and_latents(model: StableAudioModel) -> None:
    def frames(**settings: Any) -> int:
        return model.generate("koto", **QUICK, return_latents=True, **settings).shape[2]

    assert (frames(), frames(duration_padding_sec=0), frames(duration_padding_sec=12)) == (76, 12, 140)
    whole = model.generate("koto", **QUICK, duration_padding_sec=1, truncate_output_to_duration=False)
    assert whole.shape[2] == 22 * 4096
    assert torch.equal(whole[..., :RATE], model.generate("koto", **QUICK, duration_padding_sec=1))
    assert model.generator.generate("koto", **QUICK).audio[0].shape[1] == RATE, "the generator stays as it was"


@pytest.mark.parametrize("chunked", [True, False])
def test_chunked_decoding(model: StableAudioModel, chunked: bool) -> None:
    assert model.generate(prompt="koto", **QUICK, chunked_decode=chunked).shape == (1, 2, RATE)


def test_adapters() -> None:
    model = StableAudioModel.from_pretrained("nano", device="cpu")
    plain = model.generate(prompt="koto", **QUICK)
    model.load_lora([str(LEARNED / "koto.safetensors"), str(LEARNED / "koto.safetensors")])
    both = model.generate(prompt="koto", **QUICK)
    model.set_lora_strength(1.0, lora_index=0)
    model.set_lora_strength(0.3, lora_index=1)
    assert [adapter["strength"] for adapter in model.generator.adapters] == [1.0, 0.3]
    assert not torch.equal(both, model.generate(prompt="koto", **QUICK))
    model.set_lora_strength(0.0)
    assert torch.equal(plain, model.generate(prompt="koto", **QUICK))


@pytest.mark.parametrize(
    "wrong",
    [
        {"conditioning": []}, {"duration_padding_sec": -1}, {"duration_padding_sec": "6"}, {"init_audio": (1, 2)},
        {"duration": [0.5, "x"]}, {"prompt": 7},
    ],
)  # fmt: skip
def test_what_is_not_offered_is_refused(model: StableAudioModel, wrong: dict[str, Any]) -> None:
    with pytest.raises(GenerationError, match=next(iter(wrong))):
        model.generate(**{"prompt": "koto"} | QUICK | wrong)


class TestAutoencoder:
    @pytest.fixture(scope="class")
    def ae(self) -> AutoencoderModel:
        return AutoencoderModel.from_pretrained("nano", device="cpu")

    def test_a_waveform_there_and_back(self, ae: AutoencoderModel, audio: Any) -> None:
        waveform, sr = audio
        latents = ae.encode(waveform, sr)
        assert latents.shape == (1, 128, 22)
        restored = torch.from_numpy(latents[0].cpu().numpy()).unsqueeze(0).to(ae.device)
        assert ae.decode(restored).shape == (1, 2, 22 * 4096)

    def test_mono_is_duplicated(self, ae: AutoencoderModel, audio: Any) -> None:
        waveform, sr = audio
        mono = waveform[:1]
        expected = ae.encode(mono.repeat(2, 1), sr)
        for same in (mono, mono[0], mono[None]):
            assert torch.equal(ae.encode(same, sr), expected)

    def test_a_batch_of_lengths_and_rates(self, ae: AutoencoderModel, audio: Any) -> None:
        waveform, sr = audio
        latents = ae.encode([waveform, waveform[:, :RATE]], sr=[sr, sr // 2])
        assert latents.shape == (2, 128, 22)
        assert torch.equal(ae.encode(torch.stack([waveform] * 2), sr), ae.encode([waveform] * 2, sr))
        with pytest.raises(GenerationError, match="sr has 1"):
            ae.encode([waveform, waveform], [sr])

    def test_chunks(self, ae: AutoencoderModel, audio: Any) -> None:
        waveform, sr = audio
        latents = ae.encode(waveform, sr, chunked=True, chunk_size=16, overlap=4)
        whole = ae.encode(waveform, sr)
        assert latents.shape == whole.shape
        assert torch.allclose(latents, whole, atol=1e-3)
        with pytest.raises(ConfigError):
            ae.encode(waveform, sr, chunked=True, chunk_size=16, overlap=16)
        assert ae.decode(latents, chunked=True, chunk_size=16, overlap=4).shape == (1, 2, 22 * 4096)
