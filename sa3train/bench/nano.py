"""How well nano reconstructs audio and follows prompts, by rulers that ship with it: `sa3-bench nano`.

`assets/nano` holds one held-out clip per sound class (`held_out/*.ogg`), a classifier of those classes and of the
instruments kept from nano, trained on real clips, and for two of these instruments an adapter and clips that it was not
trained on (`learned/`). Shapes: C channels, N samples, B items, M mel bands.
"""

import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sa3train.audio.io import read_audio
from sa3train.audio.metrics import mel_spectrogram
from sa3train.bench.figures import Figure, Options
from sa3train.bench.measure import own_threads
from sa3train.core.errors import ConfigError
from sa3train.evaluation.attributes import ATTRIBUTES, end_of_sound
from sa3train.evaluation.classifier import Classifier
from sa3train.inference import Generator
from sa3train.models.checkpoint import load_autoencoder
from sa3train.models.nano import ASSETS

RATE = 44100
SECONDS = 3.0
LINEAR_SDR = 7.5  # dB: a PCA of 4096-sample stereo frames at width 256, on FluidR3 material
CFG = 4.0
STRENGTHS = (0.0, 0.5, 1.0)
LEARNED_PROMPTS = (
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
class Wish:
    """A prompt and the answer one attribute checker should give."""

    prompt: str
    attribute: str
    answer: str


WISHES = (
    Wish("acoustic bass, low register, melody", "register", "low"),
    Wish("slap bass, repeated notes, 112 BPM", "register", "low"),
    Wish("solo flute, high register, single note", "register", "high"),
    Wish("music box, arpeggio, high register", "register", "high"),
    Wish("TrackType: Drums, Instruments: Kick drum, BPM: 104", "brightness", "dark"),
    Wish("Sound effect: drone.", "brightness", "dark"),
    Wish("TrackType: Drums, Instruments: Hi-hat, BPM: 104", "brightness", "bright"),
    Wish("crash cymbal, loud", "brightness", "bright"),
    Wish("A marimba plays staccato repeated notes at 72 BPM.", "pace", "slow"),
    Wish("A piano plays staccato repeated notes at 60 BPM.", "pace", "slow"),
    Wish("A marimba plays staccato repeated notes at 160 BPM.", "pace", "fast"),
    Wish("A harpsichord plays staccato repeated notes at 144 BPM.", "pace", "fast"),
    Wish("A church organ plays legato chords.", "texture", "tonal"),
    Wish("solo clarinet, legato, melody", "texture", "tonal"),
    Wish("Sound effect: wind.", "texture", "noisy"),
    Wish("snare drum, loop, 144 BPM", "texture", "noisy"),
    Wish("piano, single note, legato", "decay", "dying"),
    Wish("marimba, single note, staccato", "decay", "dying"),
    Wish("hammond organ, single note, legato", "decay", "held"),
    Wish("string ensemble, single note, legato", "decay", "held"),
    Wish("TrackType: Instrument, Instruments: Warm pad, Stereo: mono", "width", "mono"),
    Wish("Sound effect: riser in mono.", "width", "mono"),
    Wish("TrackType: Instrument, Instruments: Warm pad, Stereo: stereo", "width", "stereo"),
    Wish("Sound effect: wind in stereo.", "width", "stereo"),
)


def run(options: Options) -> list[Figure]:
    """Reconstruction; and, where trained weights ship, classes, attributes and endings of both models.

    Raises `ConfigError` when the installation lacks the rulers.
    """
    if not (ASSETS / "classifier.safetensors").is_file():
        raise ConfigError(f"{ASSETS} holds no classifier.safetensors to judge nano by. Install sa3train again.")
    classifier = Classifier.load(ASSETS / "classifier.safetensors")
    with own_threads(options.threads), torch.inference_mode():
        figures = reconstruction(classifier, ASSETS / "held_out")
        for name in ("nano-base", "nano"):
            generator = Generator.from_pretrained(name, options.device, "fp32")
            figures += following(generator, classifier, classes(ASSETS / "held_out"))
            figures += learned(generator, classifier, ASSETS / "learned")
    return with_difference(figures)


def classes(folder: Path) -> list[str]:
    """What nano was trained on: the classes of the held-out clips."""
    return sorted(_class_of(path) for path in folder.glob("*.ogg"))


def with_difference(figures: list[Figure]) -> list[Figure]:
    """The figures, and by how many points the post-trained model's attributes fall short of the base's."""
    right = {each.name: each.value or 0.0 for each in figures}
    short = right["nano-base: requested attributes right"] - right["nano: requested attributes right"]
    return [*figures, Figure("nano: requested attributes fewer than nano-base's", short, "points", 10.0)]


def si_sdr(real_CN: Tensor, made_CN: Tensor) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019), over both channels."""
    scaled = (real_CN * made_CN).sum() / real_CN.square().sum().clamp_min(1e-12) * real_CN
    return float(10 * torch.log10(scaled.square().sum() / (made_CN - scaled).square().sum().clamp_min(1e-12)))


def log_mel_distance(real_CN: Tensor, made_CN: Tensor) -> float:
    """Mean absolute difference of the two log-mel spectrograms in dB, both floored 60 dB under the real one's peak."""
    real, made = (mel_spectrogram(audio_CN, RATE) for audio_CN in (real_CN, made_CN))
    floor = real.max() - 60
    return float((real.clamp_min(floor) - made.clamp_min(floor)).abs().mean())


def reconstruction(classifier: Classifier, folder: Path) -> list[Figure]:
    """SI-SDR, log-mel distance and what the classifier still hears, over one held-out clip per class."""
    autoencoder = load_autoencoder("nano")
    ratios, distances, kept, known = {}, {}, 0, 0
    for path in sorted(folder.glob("*.ogg")):
        real_CN, _ = read_audio(path)
        draws = torch.Generator().manual_seed(0)  # the decoder's noise is what hiss is made of
        made_CN = autoencoder.decode(autoencoder.encode(real_CN[None]), generator=draws)[0, :, : real_CN.shape[1]]
        ratios[_class_of(path)] = si_sdr(real_CN, made_CN)
        distances[_class_of(path)] = log_mel_distance(real_CN, made_CN)
        if classifier.name(real_CN, RATE) == _class_of(path):
            known += 1
            kept += classifier.name(made_CN, RATE) == _class_of(path)
    return [
        Figure(
            "autoencoder: SI-SDR, median over classes",
            statistics.median(ratios.values()),
            "dB",
            LINEAR_SDR,
            ">=",
            _by_class(ratios),
        ),
        Figure(
            "autoencoder: log-mel distance, median over classes",
            statistics.median(distances.values()),
            "dB",
            note=_by_class(distances),
        ),
        Figure("autoencoder: classes still recognised", 100 * kept / max(1, known), "%", 90, ">="),
    ]


def following(generator: Generator, classifier: Classifier, names: list[str]) -> list[Figure]:
    """Class accuracy, attributes and endings of one model, one seed per prompt."""
    name = generator.facts.name
    base = generator.facts.objective == "rectified_flow"
    settings = {"cfg_scale": CFG} if base else {}
    prompts = [f"solo {each}" for each in names]
    clips = generator.generate(prompts, duration=SECONDS, seed=1, **settings).audio  # type: ignore[arg-type]
    found = [classifier.probabilities(clip, RATE) for clip in clips]
    wanted = [classifier.names.index(each) for each in names]
    best = sum(int(each.argmax()) == index for index, each in zip(wanted, found, strict=True))
    five = sum(index in each.topk(5).indices.tolist() for index, each in zip(wanted, found, strict=True))
    wishes = generator.generate([wish.prompt for wish in WISHES], duration=SECONDS, seed=2, **settings)  # type: ignore[arg-type]
    right = [
        ATTRIBUTES[wish.attribute].answer(clip, RATE) == wish.answer
        for wish, clip in zip(WISHES, wishes.audio, strict=True)
    ]
    late = endings(generator, settings)
    count = len(classifier.names)
    answered = 100 * sum(right) / len(right)
    note = f"{len(WISHES)} prompts, two answers each: 50 % by chance"
    return [
        Figure(
            f"{name}: class named first", 100 * best / len(names), "%", 60 if base else None, ">=", chance(count, 1)
        ),
        Figure(f"{name}: class among the first five", 100 * five / len(names), "%", note=chance(count, 5)),
        Figure(f"{name}: requested attributes right", answered, "%", 80 if base else None, ">=", note),
        Figure(f"{name}: ending off by, median", statistics.median(late), "s", 0.5),
    ]


def learned(generator: Generator, classifier: Classifier, folder: Path) -> list[Figure]:
    """What the adapters of instruments that nano never heard do to it at strengths 0, 0.5 and 1, and both at once."""
    base = generator.facts.objective == "rectified_flow"
    settings = {"cfg_scale": CFG} if base else {}
    paths = sorted(folder.glob("*.safetensors"))
    names = [_class_of(path) for path in paths]

    def play(name: str) -> list[Tensor]:
        prompts = [prompt.format(name) for prompt in LEARNED_PROMPTS]
        return generator.generate(prompts, duration=SECONDS, seed=4, **settings).audio  # type: ignore[arg-type]

    figures, alone = [], {}
    for name, path in zip(names, paths, strict=True):
        real_M = mean_spectrum([read_audio(clip)[0] for clip in sorted(folder.glob(f"{path.stem}_*.ogg"))])
        generator.load_adapter(path, strength=1.0)
        chances, distances = [], []
        for strength in STRENGTHS:
            generator.set_strength(strength, adapter=0)
            clips = play(name)
            chances.append(probability(classifier, clips, name))
            distances.append(float((mean_spectrum(clips) - real_M).abs().mean()))
        generator.remove_adapter(0)
        alone[name] = chances[0]
        title = f"{generator.facts.name} with the {name} adapter"
        figures += [
            Figure(f"{title}: probability of {name}, least rise", _least_rise(chances), "", 0.0, ">=", _at(chances)),
            Figure(
                f"{title}: spectral distance to real clips, least fall",
                _least_rise([-each for each in distances]),
                "dB",
                0.0,
                ">=",
                _at(distances),
            ),
        ]
    for path in paths:
        generator.load_adapter(path, strength=1.0)
    gains = {name: probability(classifier, play(name), name) - alone[name] for name in names}
    for _ in paths:
        generator.remove_adapter(0)
    title = f"{generator.facts.name} with both adapters: probability of the one asked for, least gain over none"
    return [*figures, Figure(title, min(gains.values()), "", 0.0, ">=", _by_class(gains, 2))]


def probability(classifier: Classifier, clips: list[Tensor], name: str) -> float:
    """The mean probability of a class over clips."""
    index = classifier.names.index(name)
    return statistics.fmean(float(classifier.probabilities(clip, RATE)[index]) for clip in clips)


def mean_spectrum(clips: list[Tensor]) -> Tensor:
    """The mean over clips of their mean log-mel spectrum relative to its loudest band, floored at -60 dB: (M,)."""
    means = [10 * torch.log10((10 ** (mel_spectrogram(clip, RATE) / 10)).mean(dim=1)) for clip in clips]
    return torch.stack([(each - each.max()).clamp_min(-60) for each in means]).mean(dim=0)


def _least_rise(values: list[float]) -> float:
    return min(after - before for before, after in itertools.pairwise(values))


def _at(values: list[float]) -> str:
    return ", ".join(f"{value:.2f} at {strength:g}" for value, strength in zip(values, STRENGTHS, strict=True))


def chance(classes: int, picks: int) -> str:
    """What guessing would reach."""
    return f"{100 * picks / classes:.1f} % by chance over {classes} classes"


def endings(generator: Generator, settings: dict[str, float]) -> list[float]:
    """How far from the asked duration the sound ends when nothing is cut off, for held sounds of 2, 4 and 6 seconds."""
    off = []
    for seconds in (2.0, 4.0, 6.0):
        prompts = ["A church organ plays legato chords.", "Sound effect: wind.", "warm pad, chords, legato"]
        made = generator.generate(prompts, duration=seconds, seed=3, return_latents=True, **settings)  # type: ignore[arg-type]
        assert made.latents is not None
        draws = torch.Generator().manual_seed(0)
        whole = generator.model.autoencoder.decode(made.latents.to(generator.device), generator=draws)
        off += [abs(end_of_sound(clip.cpu(), RATE) - seconds) for clip in whole]
    return off


def _by_class(values: dict[str, float], digits: int = 1) -> str:
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in values.items())


def _class_of(path: Path) -> str:
    return path.stem.replace("_", " ")
