"""The generator beyond the recorded cases: modes, batches, seeds, cancelling, what the user is told."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.audio import tone, write_clip
from helpers.generation import generate_latents, inpaint
from helpers.golden import GOLDEN
from sa3train.adapters.formats.io import load_adapter
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.core.errors import AudioError, ConfigError, GenerationError, MemoryShortageError
from sa3train.diffusion.samplers import SAMPLERS
from sa3train.inference import Generator, clip, generator, runtime
from sa3train.inference.runtime import choose_dtype, suggest_generation_fixes
from sa3train.models import int8_linear
from sa3train.models.dit import compile_blocks

QUICK: dict[str, Any] = {"prompt": "low hum", "duration": 0.5, "steps": 3, "seed": 4, "cfg_scale": 1.0}
LORA = GOLDEN / "plain" / "adapters" / "lora.safetensors"
SOURCE = (44100, torch.from_numpy(tone(1.0).T.copy()))


class Cancelled(Exception):
    pass


def test_defaults_of_both_kinds_of_model(make: Callable[..., Generator]) -> None:
    base = make().generate("low hum", duration=0.3, seed=1, steps=2)
    post = make(objective="rf_denoiser").generate("low hum", duration=0.3, seed=1)
    assert (base.record["settings"]["cfg_scale"], base.record["settings"]["sampler_type"]) == (7.0, "euler")
    found = post.record["settings"]
    assert (found["steps"], found["cfg_scale"], found["sampler_type"]) == (8, 1.0, "pingpong")


def test_the_same_seed_gives_the_same_bits_whatever_torch_s_own_state(gen: Generator) -> None:
    torch.manual_seed(1)
    first = gen.generate(**QUICK)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = gen.generate(**QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.audio[0], second.audio[0])
    assert first.seeds == [4]
    other = gen.generate(**{**QUICK, "seed": 5})
    assert not torch.equal(first.audio[0], other.audio[0])


def test_a_random_seed_can_be_used_again(gen: Generator) -> None:
    first = gen.generate(**{**QUICK, "seed": -1})
    again = gen.generate(**{**QUICK, "seed": first.seeds[0]})
    assert torch.equal(first.audio[0], again.audio[0])


def test_a_generator_takes_the_place_of_the_seed(gen: Generator) -> None:
    settings = {name: value for name, value in QUICK.items() if name != "seed"}
    own = gen.generate(**settings, generator=torch.Generator().manual_seed(4))
    assert torch.equal(own.audio[0], gen.generate(**QUICK).audio[0])
    assert own.seeds == [None]


def test_a_generator_elsewhere_than_on_the_cpu_is_refused(gen: Generator) -> None:
    with pytest.raises(GenerationError, match="CPU generator"):
        gen.generate("a", generator=SimpleNamespace(device=torch.device("cuda")))  # type: ignore[arg-type]


def test_each_item_has_its_own_length_within_full_scale(gen: Generator) -> None:
    result = gen.generate(["hum", "bells", "rain"], duration=[0.5, 1.0, 0.25], steps=2, seed=1, negative_prompt="harsh")
    assert [audio.shape for audio in result.audio] == [(2, 22050), (2, 44100), (2, 11025)]
    assert all(audio.dtype == torch.float32 and audio.abs().max() <= 1 for audio in result.audio)
    assert result.latents is None


def test_prompt_negative_prompt_and_duration_change_the_item_they_are_for(gen: Generator) -> None:
    given: dict[str, Any] = {"prompt": ["hum", "bells"], "duration": [0.5, 0.6], "negative_prompt": ["a", "b"]}
    before = generate_latents(gen, steps=2, seed=1, **given)
    for change in ({"prompt": ["hum", "rain"]}, {"negative_prompt": ["a", "c"]}, {"duration": [0.5, 0.55]}):
        after = generate_latents(gen, steps=2, seed=1, **given | change)
        torch.testing.assert_close(before[0], after[0], atol=1e-4, rtol=0)  # products of other shapes round otherwise
        assert (before[1] - after[1]).abs().max() > 1e-3


def test_settings_of_guidance_matter(gen: Generator) -> None:
    changes = {"cfg_interval": (0.8, 1.0), "cfg_norm_threshold": 0.1, "scale_phi": 0.5, "apg_scale": 0.0, "steps": 3}
    results = [gen.generate(**QUICK | {"cfg_scale": 4.0, name: value}).audio[0] for name, value in changes.items()]
    for index, result in enumerate(results):
        assert not any(torch.equal(result, other) for other in results[index + 1 :])


@pytest.mark.parametrize("sampler", ["euler", "dpmpp", "rk4", "pingpong"])
def test_every_sampler_generates_and_none_returns_the_noise(gen: Generator, sampler: str) -> None:
    latents = generate_latents(gen, **QUICK, sampler_type=sampler)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(4))
    assert (latents - noise).std() > 0.3


@pytest.mark.slow
def test_more_steps_of_euler_approach_rk4(gen: Generator) -> None:
    exact, fine, coarse = (
        generate_latents(gen, **QUICK | {"sampler_type": sampler, "steps": steps})
        for sampler, steps in (("rk4", 24), ("euler", 48), ("euler", 12))
    )
    assert (fine - exact).norm() < 0.6 * (coarse - exact).norm()


def test_level_zero_gives_the_audio_back_through_the_autoencoder(gen: Generator) -> None:
    latents = generate_latents(gen, "x", duration=1.0, init_audio=SOURCE, init_noise_level=0.0, seed=1)
    padded = torch.nn.functional.pad(SOURCE[1], (0, latents.shape[-1] * 4096 - 44100))
    with torch.no_grad():
        assert torch.equal(latents, gen.model.autoencoder.encode(padded[None]))


def test_lower_levels_stay_closer_to_the_audio(gen: Generator) -> None:
    settings = QUICK | {"duration": 1.0, "steps": 4, "init_audio": SOURCE}
    source, *others = (generate_latents(gen, **settings, init_noise_level=level) for level in (0.0, 0.1, 0.4, 0.9))
    distances = [(other - source)[..., :10].norm().item() for other in others]
    assert distances == sorted(distances)


def test_starting_from_one_audio_and_inpainting_another_go_together(gen: Generator) -> None:
    other = (torch.from_numpy(tone(1.0, 220.0).T.copy()), 44100)
    settings = QUICK | {"duration": 1.0} | inpaint(other, 0.3, 0.6)
    both = gen.generate(**settings, init_audio=SOURCE, init_noise_level=0.5)
    alone = gen.generate(**settings)
    assert not torch.equal(both.audio[0], alone.audio[0])


def test_inpainting_works_in_a_batch(gen: Generator) -> None:
    regions = inpaint(SOURCE, [0.1, 0.5], [0.3, 0.7])
    result = gen.generate(["a", "b"], duration=[0.8, 1.0], steps=2, seed=1, **regions)
    assert [audio.shape[1] for audio in result.audio] == [35280, 44100]


def test_continuation_as_the_public_documents_write_it(gen: Generator) -> None:
    result = gen.generate("and on it goes", duration=2.0, steps=2, **inpaint(SOURCE, 1.0, 2.0))
    assert result.audio[0].shape == (2, 88200)
    assert result.warnings == []


def test_cancelling_leaves_the_generator_as_it_was(gen: Generator) -> None:
    seen: list[tuple[int, int]] = []

    def stop(step: int, total: int, sigma: float, denoised: torch.Tensor) -> None:
        seen.append((step, total))
        if step == 1:
            raise Cancelled

    before = gen.generate(**QUICK)
    with pytest.raises(Cancelled):
        gen.generate(**QUICK, callback=stop)
    assert seen == [(0, 3), (1, 3)]
    assert torch.equal(gen.generate(**QUICK).audio[0], before.audio[0])


def test_chunked_decoding_is_by_choice(gen: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool | None] = []
    decode = gen.model.autoencoder.decode

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(kwargs["chunked"])
        return decode(*args, **kwargs)

    monkeypatch.setattr(gen.model.autoencoder, "decode", spy)
    for choice in (None, True, False):
        result = gen.generate(**{**QUICK, "duration": 7.0, "steps": 1}, chunked_decode=choice)
        assert result.audio[0].shape == (2, 308700)
    assert asked == [None, True, False]


def test_clipping_is_counted_and_said(gen: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = gen.model.autoencoder.decode
    quiet = gen.generate(**QUICK)
    monkeypatch.setattr(gen.model.autoencoder, "decode", lambda *args, **kwargs: 20 * decode(*args, **kwargs))
    loud = gen.generate(**QUICK)
    expected = (20 * quiet.audio[0]).abs() > 1
    assert 0 < expected.float().mean() < 1
    assert loud.clipped_shares == [pytest.approx(expected.float().mean().item())]
    assert loud.audio[0].abs().max() == 1
    assert "full scale" in loud.warnings[0]
    assert quiet.clipped_shares == [0.0]
    assert quiet.warnings == []


def test_nan_from_the_model_is_an_error(gen: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gen.model.autoencoder, "decode", lambda z, **kwargs: torch.full((len(z), 2, z.shape[-1] * 4096), float("nan"))
    )
    with pytest.raises(GenerationError, match="NaN or infinity"):
        gen.generate(**QUICK)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_audio": SOURCE, "init_noise_level": 1.0, "duration": 1.0}, "init_audio had no effect"),
        (
            {"init_audio": SOURCE, "init_noise_level": 0.0, "duration": 1.0},
            "prompt and sampling settings had no effect",
        ),
        ({"init_audio": SOURCE, "init_noise_level": 0.5}, "is 1.00 s long and was truncated"),
        ({"init_audio": SOURCE, "init_noise_level": 0.5, "duration": 2.0}, "to 2 s, starts from silence"),
        ({"duration": 1.0} | inpaint(SOURCE, [0.0, 0.5], [0.6, 1.0]), "inpaint_audio had no effect"),
        ({"duration": 2.0} | inpaint(SOURCE, 0.2, 0.4), "from 1.00 to 2 s the result is silence"),
        ({"init_audio": (44100, torch.full((2, 4410), 0.5)), "init_noise_level": 0.5}, "init_audio is silent"),
        ({"prompt": "word " * 60}, "truncated to 24"),
    ],
)
def test_what_a_user_should_know_is_said(gen: Generator, settings: dict[str, Any], message: str) -> None:
    assert any(message in warning for warning in gen.generate(**{**QUICK, **settings}).warnings)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("init_noise_level", [None, 0.5, 0.0])
def test_a_cfg_interval_without_a_sampled_noise_level_is_refused(
    gen: Generator, sampler: str, init_noise_level: float | None
) -> None:
    audio = {} if init_noise_level is None else {"init_audio": SOURCE, "init_noise_level": init_noise_level}
    settings: dict[str, Any] = {**QUICK, **audio, "sampler_type": sampler, "cfg_scale": 3.0, "steps": 2}
    settings["duration"] = 1.0
    with pytest.raises(GenerationError, match=r"cfg_interval=\(0\.1, 0\.11\) would have no effect"):
        gen.generate(**settings, cfg_interval=(0.1, 0.11))
    if init_noise_level != 0.0:
        gen.generate(**settings, cfg_interval=(init_noise_level or 1.0, 1.0))


def test_a_conditioner_strength_without_layers_there_is_said(gen: Generator, caplog: Any) -> None:
    adapter = load_adapter(LORA)
    layers = {path: params for path, params in adapter.tensors.items() if not path.startswith("conditioners.")}
    gen.load_adapter(dataclasses.replace(adapter, tensors=layers), conditioner_strength=0.5, allow_partial=True)
    assert "conditioner_strength=0.5 has no effect" in caplog.text


def test_bad_audio_and_a_too_long_duration_are_refused(gen: Generator) -> None:
    with pytest.raises(AudioError, match="NaN"):
        gen.generate("x", init_audio=(44100, torch.full((2, 500), float("nan"))), init_noise_level=0.5)
    with pytest.raises(GenerationError, match="duration=121"):
        gen.generate(["x", "y"], duration=[1, 121])


@pytest.mark.slow
def test_compiled_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Traced and run as they are ("eager" leaves code generation out)."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    generator = Generator.from_pretrained("nano", device="cpu", precision="fp32")

    settings = QUICK | {"duration": 1, "steps": 1}
    plain = generate_latents(generator, **settings)
    compile_blocks(generator.model.dit, backend="eager")
    torch.testing.assert_close(generate_latents(generator, **settings), plain, atol=1e-4, rtol=0)


def test_compiling_without_a_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sa3train.models.dit.shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="compiler"):
        Generator.from_pretrained("nano", device="cpu", precision="fp32", compiled=True)


def test_from_pretrained_loads_at_the_asked_precision(tmp_path: Any) -> None:
    generator = Generator.from_pretrained("nano-base", device="cpu", precision="bf16")
    assert generator.model.dit.dtype == torch.bfloat16
    clip = write_clip(tmp_path / "a.wav", tone(0.4))
    result = generator.generate("hum", duration=0.4, steps=2, seed=1, init_audio=clip, init_noise_level=0.7)
    assert result.audio[0].dtype == torch.float32
    assert result.record["precision"] == "bf16"
    assert result.record["model"]["source"] == "nano-base"


@pytest.mark.skipif(bool(int8_linear.find_int8_fault()), reason="this processor does not sum 8-bit products exactly")
def test_int8_is_near_fp32_and_follows_adapters() -> None:
    settings: dict[str, Any] = {"prompt": "solo cello", "duration": 1.0, "steps": 4, "seed": 1, "return_latents": True}
    state = torch.get_rng_state()
    with torch.inference_mode():
        exact, integers = (Generator.from_pretrained("nano", "cpu", precision) for precision in ("fp32", "int8"))
    assert torch.equal(torch.get_rng_state(), state)
    injected = inject(exact.model.get_adapter_root(), AdapterSpec("lora", rank=2))
    for parameter in injected.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    adapter = injected.export()
    injected.remove()
    first: dict[float, torch.Tensor] = {}
    for each in (exact, integers):
        each.load_adapter(adapter)
    for strength in (0.0, 1.0, 0.0):
        latents = []
        for each in (exact, integers):
            each.set_strength(strength)
            output = each.generate(**settings)
            assert output.latents is not None
            latents.append(output.latents.flatten())
        assert torch.cosine_similarity(latents[0], latents[1], dim=0) > 0.995
        assert torch.equal(first.setdefault(strength, latents[1]), latents[1])
    assert torch.cosine_similarity(first[0.0], first[1.0], dim=0) < 0.95
    assert output.record["precision"] == "int8"


def test_int8_is_refused_where_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="int8 does not run here: it is for CPUs, not cuda"):
        choose_dtype("int8", torch.device("cuda"))
    with pytest.raises(ConfigError, match="compiled has no effect on precision=int8"):
        Generator.from_pretrained("nano", "cpu", "int8", compiled=True)
    monkeypatch.setattr(int8_linear, "_pack", lambda W_OI: (_ for _ in ()).throw(RuntimeError("no such kernel")))
    with pytest.raises(ConfigError, match="int8 does not run here: no such kernel"):
        choose_dtype("int8", torch.device("cpu"))
    monkeypatch.setattr(int8_linear.Int8Linear, "forward", lambda self, x: torch.zeros(4, 32))
    with pytest.raises(ConfigError, match="int8 does not run here: products are wrong by 100%"):
        choose_dtype("int8", torch.device("cpu"))


@pytest.mark.parametrize(("gain", "expected"), [(1.0, ("fp32", torch.float32)), (2.0, ("bf16", torch.bfloat16))])
def test_auto_precision_is_what_this_cpu_computes_fastest(
    gain: float, expected: tuple[str, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sa3train.models.precision.get_bf16_speedup", lambda device: gain)
    assert choose_dtype("auto", torch.device("cpu")) == expected


def test_a_precision_that_cannot_be_had_is_said() -> None:
    with pytest.raises(ConfigError, match="unknown precision 'fp64'"):
        choose_dtype("fp64", torch.device("cpu"))


def test_what_does_not_fit_is_said_with_what_would_help(gen: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(clip, "sample_latents", full)
    with pytest.raises(MemoryShortageError, match=r"while generating 0\.5 s.*Try: a duration below 0\.5 s; "):
        gen.generate(**QUICK)
    with pytest.raises(MemoryShortageError, match=r"3 items of up to 0\.5 s.*Try: a smaller batch;.*chunked decoding"):
        gen.generate(**QUICK | {"prompt": ["a", "b", "c"], "chunked_decode": False})
    monkeypatch.setattr(generator, "load_checkpoint", full)
    for known, words in ((True, "precision bf16; or a smaller"), (False, "a smaller model")):
        monkeypatch.setattr(runtime, "has_bf16_instructions", lambda known=known: known)
        with pytest.raises(MemoryShortageError, match=rf"while loading nano in fp32.*Try: {words}"):
            Generator.from_pretrained("nano", "cpu", "fp32")


def test_a_graphics_card_without_bf16_is_told_of_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for supported, precision in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, known=supported: known)
        assert f"precision {precision}" in suggest_generation_fixes(cuda, "fp32")
    assert suggest_generation_fixes(cuda, "bf16", None, True) == [
        "no CUDA graphs",
        "a smaller model",
        "another device, such as cpu",
    ]
