"""Quality of nano: reconstruction of audio, following of prompts, and adapters.

`assets/nano` has the references: one held-out clip of each sound class (`held_out/*.ogg`), a classifier trained on real
clips of these classes and of instruments that nano was not trained on, and for two of these instruments an adapter with
clips that it was not trained on (`learned/`). Shapes: C channels, N samples, B items, M mel bands.
"""

import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sa3train.audio.io import read_audio
from sa3train.audio.metrics import compute_mel_spectrogram, compute_si_sdr
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import use_threads
from sa3train.bench.packs import measure_packs
from sa3train.core.errors import ConfigError
from sa3train.evaluation.attributes import ATTRIBUTES, find_end_of_sound
from sa3train.evaluation.classifier import Classifier
from sa3train.inference import GenerationOutput, Generator
from sa3train.models.autoencoder import Autoencoder
from sa3train.models.checkpoint import load_autoencoder
from sa3train.models.nano import ASSETS

RATE = 44100
SECONDS = 3.0
SDR_TARGET = 7.5  # dB: what a PCA of 4096-sample stereo frames to width 256 reaches on FluidR3 material
CFG_SCALE = 4.0
STRENGTHS = (0.0, 0.5, 1.0)
ADAPTER_PROMPTS = (
    "solo {}",
    "{}, melody, 96 BPM",
    "solo {}, arpeggio, mid register",
    "A {} plays staccato repeated notes at 132 BPM.",
    "TrackType: Instrument, Instruments: {}",
    "{}, single note, legato",
    "{}, scale run, fast",
    "A loud {} plays legato chords.",
)


@dataclass(frozen=True)
class _AttributePrompt:
    """A prompt, and the answer that the measurement of an attribute should give."""

    prompt: str
    attribute: str
    answer: str


ATTRIBUTE_PROMPTS = (
    _AttributePrompt("acoustic bass, low register, melody", "register", "low"),
    _AttributePrompt("slap bass, repeated notes, 112 BPM", "register", "low"),
    _AttributePrompt("solo flute, high register, single note", "register", "high"),
    _AttributePrompt("music box, arpeggio, high register", "register", "high"),
    _AttributePrompt("TrackType: Drums, Instruments: Kick drum, BPM: 104", "brightness", "dark"),
    _AttributePrompt("Sound effect: drone.", "brightness", "dark"),
    _AttributePrompt("TrackType: Drums, Instruments: Hi-hat, BPM: 104", "brightness", "bright"),
    _AttributePrompt("crash cymbal, loud", "brightness", "bright"),
    _AttributePrompt("A marimba plays staccato repeated notes at 72 BPM.", "pace", "slow"),
    _AttributePrompt("A piano plays staccato repeated notes at 60 BPM.", "pace", "slow"),
    _AttributePrompt("A marimba plays staccato repeated notes at 160 BPM.", "pace", "fast"),
    _AttributePrompt("A harpsichord plays staccato repeated notes at 144 BPM.", "pace", "fast"),
    _AttributePrompt("A church organ plays legato chords.", "texture", "tonal"),
    _AttributePrompt("solo clarinet, legato, melody", "texture", "tonal"),
    _AttributePrompt("Sound effect: wind.", "texture", "noisy"),
    _AttributePrompt("snare drum, loop, 144 BPM", "texture", "noisy"),
    _AttributePrompt("piano, single note, legato", "decay", "dying"),
    _AttributePrompt("marimba, single note, staccato", "decay", "dying"),
    _AttributePrompt("hammond organ, single note, legato", "decay", "held"),
    _AttributePrompt("string ensemble, single note, legato", "decay", "held"),
    _AttributePrompt("TrackType: Instrument, Instruments: Warm pad, Stereo: mono", "width", "mono"),
    _AttributePrompt("Sound effect: riser in mono.", "width", "mono"),
    _AttributePrompt("TrackType: Instrument, Instruments: Warm pad, Stereo: stereo", "width", "stereo"),
    _AttributePrompt("Sound effect: wind in stereo.", "width", "stereo"),
)


def run(options: Options) -> list[Figure]:
    """Measure nano-base and nano with their shipped weights.

    Args:
        options: `device` and `threads`.

    Returns:
        Quality of reconstruction, also of packs that nano was not trained on, of prompts, endings and adapters.

    Raises:
        ConfigError: The installation lacks the reference classifier.
    """
    if not (ASSETS / "classifier.safetensors").is_file():
        raise ConfigError(f"{ASSETS} has no classifier.safetensors, which this benchmark needs. Reinstall sa3train.")
    classifier = Classifier.load(ASSETS / "classifier.safetensors")
    with use_threads(options.threads), torch.inference_mode():
        autoencoder = load_autoencoder("nano")
        figures = _measure_reconstruction(classifier, autoencoder, ASSETS / "held_out")
        figures += measure_packs(autoencoder, ASSETS / "held_out")
        for name in ("nano-base", "nano"):
            generator = Generator.from_pretrained(name, options.device, "fp32")
            figures += _measure_prompt_following(generator, classifier, list_classes(ASSETS / "held_out"))
            figures += _measure_adapters(generator, classifier, ASSETS / "learned")
    return _add_difference(figures)


def list_classes(folder: Path) -> list[str]:
    """List the classes that nano was trained on.

    Args:
        folder: Folder of the held-out clips, one of each class.

    Returns:
        Sorted names.
    """
    return sorted(_get_class(path) for path in folder.glob("*.ogg"))


def _add_difference(figures: list[Figure]) -> list[Figure]:
    """Append by how many points the post-trained model's attributes fall short of the base's."""
    right = {each.name: each.value or 0.0 for each in figures}
    short = right["nano-base: requested attributes right"] - right["nano: requested attributes right"]
    return [*figures, Figure("nano: requested attributes fewer than nano-base's", short, "points", 10.0)]


def _measure_reconstruction(classifier: Classifier, autoencoder: Autoencoder, folder: Path) -> list[Figure]:
    """Measure the autoencoder on one held-out clip of each class: SI-SDR, and classes still recognized."""
    ratios, recognized, known = {}, 0, 0
    for path in sorted(folder.glob("*.ogg")):
        real_CN, _ = read_audio(path)
        rng = torch.Generator().manual_seed(0)  # the decoder makes hiss from its noise
        made_CN = autoencoder.decode(autoencoder.encode(real_CN[None]), generator=rng)[0, :, : real_CN.shape[1]]
        ratios[_get_class(path)] = compute_si_sdr(real_CN, made_CN)
        if classifier.classify(real_CN, RATE) == _get_class(path):
            known += 1
            recognized += classifier.classify(made_CN, RATE) == _get_class(path)
    sdr, note = statistics.median(ratios.values()), _format_by_class(ratios)
    return [
        Figure("autoencoder: SI-SDR, median over classes", sdr, "dB", SDR_TARGET, ">=", note),
        Figure("autoencoder: classes still recognized", 100 * recognized / max(1, known), "%", 90, ">="),
    ]


def _generate(generator: Generator, prompts: list[str], seed: int, seconds: float = SECONDS) -> GenerationOutput:
    """Generate with guidance, unless the model is post-trained."""
    settings = {"cfg_scale": CFG_SCALE} if _is_base(generator) else {}
    return generator.generate(prompts, duration=seconds, seed=seed, return_latents=True, **settings)  # type: ignore[arg-type]


def _is_base(generator: Generator) -> bool:
    return generator.facts.objective == "rectified_flow"


def _measure_prompt_following(generator: Generator, classifier: Classifier, names: list[str]) -> list[Figure]:
    """Measure class accuracy, attributes and endings of one model."""
    clips = _generate(generator, [f"solo {each}" for each in names], seed=1).audio
    ranked = [classifier.predict(clip, RATE).topk(5).indices.tolist() for clip in clips]
    pairs = list(zip(map(classifier.names.index, names), ranked, strict=True))
    first = 100 * statistics.fmean(index == top[0] for index, top in pairs)
    five = 100 * statistics.fmean(index in top for index, top in pairs)
    clips = _generate(generator, [each.prompt for each in ATTRIBUTE_PROMPTS], seed=2).audio
    right = 100 * statistics.fmean(
        ATTRIBUTES[each.attribute].answer(clip, RATE) == each.answer
        for each, clip in zip(ATTRIBUTE_PROMPTS, clips, strict=True)
    )
    ending = statistics.median(_measure_endings(generator))
    first_target, right_target = (60, 80) if _is_base(generator) else (None, None)
    count = len(classifier.names)
    first_note, five_note = (f"{100 * picks / count:.1f}% by chance over {count} classes" for picks in (1, 5))
    right_note = f"{len(ATTRIBUTE_PROMPTS)} prompts, two answers each: 50% by chance"
    name = generator.facts.name
    return [
        Figure(f"{name}: class ranked first", first, "%", first_target, ">=", first_note),
        Figure(f"{name}: class among the first five", five, "%", note=five_note),
        Figure(f"{name}: requested attributes right", right, "%", right_target, ">=", right_note),
        Figure(f"{name}: error of the ending, median", ending, "s", 0.5),
    ]


def _measure_adapters(generator: Generator, classifier: Classifier, folder: Path) -> list[Figure]:
    """Measure adapters of instruments that nano was not trained on at strengths 0, 0.5 and 1, and both at once."""
    paths = sorted(folder.glob("*.safetensors"))
    names = [_get_class(path) for path in paths]

    def play(name: str) -> list[Tensor]:
        return _generate(generator, [prompt.format(name) for prompt in ADAPTER_PROMPTS], seed=4).audio

    figures, alone = [], {}
    for name, path in zip(names, paths, strict=True):
        real_M = _compute_mean_spectrum([read_audio(clip)[0] for clip in sorted(folder.glob(f"{path.stem}_*.ogg"))])
        generator.load_adapter(path, strength=1.0)
        probabilities, distances = [], []
        for strength in STRENGTHS:
            generator.set_strength(strength, adapter=0)
            clips = play(name)
            probabilities.append(compute_mean_probability(classifier, clips, name))
            distances.append(float((_compute_mean_spectrum(clips) - real_M).abs().mean()))
        generator.remove_adapter(0)
        alone[name] = probabilities[0]
        title = f"{generator.facts.name} with the {name} adapter"
        distance = f"{title}: spectral distance to real clips, smallest fall"
        falls = [-each for each in distances]
        figures += [
            _make_rise_figure(f"{title}: probability of {name}, smallest rise", probabilities, "", probabilities),
            _make_rise_figure(distance, falls, "dB", distances),
        ]
    for path in paths:
        generator.load_adapter(path, strength=1.0)
    gains = {name: compute_mean_probability(classifier, play(name), name) - alone[name] for name in names}
    for _ in paths:
        generator.remove_adapter(0)
    title = f"{generator.facts.name} with both adapters: probability of the requested one, smallest gain over none"
    return [*figures, Figure(title, min(gains.values()), "", 0.0, ">=", _format_by_class(gains, 2))]


def compute_mean_probability(classifier: Classifier, clips: list[Tensor], name: str) -> float:
    """Compute the mean probability of a class over clips.

    Args:
        classifier: The classifier.
        clips: Audio, each (C, N).
        name: Name of the class.

    Returns:
        Probability in [0, 1].
    """
    index = classifier.names.index(name)
    return statistics.fmean(float(classifier.predict(clip, RATE)[index]) for clip in clips)


def _compute_mean_spectrum(clips: list[Tensor]) -> Tensor:
    """Average the clips' mean log-mel spectra (M,), each relative to its loudest band and floored at -60 dB."""
    means = [10 * torch.log10((10 ** (compute_mel_spectrogram(clip, RATE) / 10)).mean(dim=1)) for clip in clips]
    return torch.stack([(each - each.max()).clamp_min(-60) for each in means]).mean(dim=0)


def _make_rise_figure(name: str, values: list[float], unit: str, shown: list[float]) -> Figure:
    """Make the figure of the smallest rise from one strength to the next; its note has the values to show."""
    rise = min(after - before for before, after in itertools.pairwise(values))
    note = ", ".join(f"{value:.2f} at {strength:g}" for value, strength in zip(shown, STRENGTHS, strict=True))
    return Figure(name, rise, unit, 0.0, ">=", note)


def _measure_endings(generator: Generator) -> list[float]:
    """Measure how far from the requested duration held sounds of 2, 4 and 6 s end when nothing is cut off."""
    errors = []
    for seconds in (2.0, 4.0, 6.0):
        prompts = ["A church organ plays legato chords.", "Sound effect: wind.", "warm pad, chords, legato"]
        made = _generate(generator, prompts, 3, seconds)
        assert made.latents is not None
        rng = torch.Generator().manual_seed(0)
        whole = generator.model.autoencoder.decode(made.latents.to(generator.device), generator=rng)
        errors += [abs(find_end_of_sound(clip.cpu(), RATE) - seconds) for clip in whole]
    return errors


def _format_by_class(values: dict[str, float], digits: int = 1) -> str:
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in values.items())


def _get_class(path: Path) -> str:
    return path.stem.replace("_", " ")
