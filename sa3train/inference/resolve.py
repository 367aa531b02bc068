"""Settings checked against a model, with what was left open filled in.

Times are in seconds, lengths in samples at the model's rate or in latent frames.
"""

import itertools
import secrets
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from sa3train.core.errors import GenerationError
from sa3train.inference.lengths import count_bar_samples, to_seconds
from sa3train.inference.settings import (
    AUDIO_SETTINGS,
    GUIDANCE_SETTINGS,
    MAX_SECONDS,
    MODEL_DEFAULTS,
    PER_ITEM_SETTINGS,
    SETTING_NAMES,
    GenerationSettings,
    count_items,
    get_default,
    is_list,
)
from sa3train.models.config import ModelConfig

NEEDED_AUDIO = {
    "init_noise_level": "init_audio",
    "keep_exact": "inpaint_audio",
    "inpaint_mask_start_seconds": "inpaint_audio",
    "inpaint_mask_end_seconds": "inpaint_audio",
}
"""Audio without which a setting has no effect."""
MIN_FRAMES = 8
"""Fewest latent frames of a loop or a window."""


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings(GenerationSettings):
    """Settings checked against a model, with nothing left open: tuples hold one value per item of the batch.

    `seed` is None where the caller brings a torch generator, `init_noise_level` without `init_audio`, and `window`
    where the audio is generated at once.
    """

    prompt: tuple[str, ...]
    prompt_at: tuple[tuple[float | str, ...], ...] | None  # type: ignore[assignment]
    negative_prompt: tuple[str, ...] | None
    duration: tuple[float, ...]
    seed: int | None  # type: ignore[assignment]
    steps: int
    sampler_type: str
    cfg_scale: float
    init_noise_level: float | None  # type: ignore[assignment]
    inpaint_mask_start_seconds: tuple[float, ...] | None
    inpaint_mask_end_seconds: tuple[float, ...] | None

    @property
    def regions(self) -> tuple[tuple[float, float], ...]:
        """Regions to regenerate, each (start, end) in seconds."""
        return tuple(zip(self.inpaint_mask_start_seconds or (), self.inpaint_mask_end_seconds or (), strict=True))


@dataclass(frozen=True)
class ModelFacts:
    """What settings are checked against.

    Attributes:
        name: The model's name, for messages.
        objective: "rectified_flow" (base model) or "rf_denoiser" (post-trained).
        sample_rate: Samples per second.
        downsampling_ratio: Samples per latent frame.
        max_frames: Latent frames of the longest audio.
        keeps_tail: Whether the output keeps what is generated beyond the duration.
    """

    name: str
    objective: str
    sample_rate: int
    downsampling_ratio: int
    max_frames: int
    keeps_tail: bool = False

    @classmethod
    def from_config(cls, config: ModelConfig, name: str) -> "ModelFacts":
        """Read them from a model's configuration, for which nothing is loaded.

        Args:
            config: The configuration.
            name: The model's name.

        Returns:
            The facts.
        """
        ratio = config.autoencoder.downsampling_ratio
        return cls(name, config.objective, config.sample_rate, ratio, config.sample_size // ratio)

    @property
    def longest(self) -> float:
        """The longest duration in seconds."""
        return self.max_frames * self.downsampling_ratio / self.sample_rate


def count_samples(facts: ModelFacts, seconds: float) -> int:
    """Count the samples that a duration is cut to.

    Args:
        facts: The model's.
        seconds: Duration.

    Returns:
        Samples at the model's rate.
    """
    return int(seconds * facts.sample_rate)


def count_generated_frames(facts: ModelFacts, seconds: float, tail: float = GenerationSettings.tail) -> int:
    """Count the latent frames to generate: for a tail more than asked, in whole pairs, at most the longest.

    Args:
        facts: The model's.
        seconds: Duration asked for.
        tail: Seconds beyond it.

    Returns:
        Latent frames.
    """
    frames = -(-int((seconds + tail) * facts.sample_rate) // facts.downsampling_ratio)
    return min(frames + frames % 2, facts.max_frames)


def count_real_frames(facts: ModelFacts, seconds: float, frames: int, tail: float = GenerationSettings.tail) -> int:
    """Count the latent frames of an item that are not padding.

    Args:
        facts: The model's.
        seconds: Duration of the item.
        frames: Latent frames that are generated for the batch.
        tail: Seconds that are generated beyond the duration.

    Returns:
        Latent frames.
    """
    effective = -(-count_samples(facts, seconds) // facts.downsampling_ratio)
    return min(effective + int(tail * facts.sample_rate / facts.downsampling_ratio), frames)


def resolve_settings(
    settings: GenerationSettings, facts: ModelFacts, *, has_generator: bool = False, given: Collection[str] = ()
) -> ResolvedSettings:
    """Check settings against a model and fill in what was left open.

    Args:
        settings: What was asked for.
        facts: The model's.
        has_generator: Whether the caller brings a torch generator, which replaces the seed.
        given: Settings that the user named, and that must have an effect even at their defaults.

    Returns:
        Settings from which the same audio is generated again.

    Raises:
        GenerationError: For lists that do not match, values beyond the model and settings that would have no effect.
    """
    if has_generator and settings.seed != -1:
        raise GenerationError(f"seed={settings.seed} has no effect beside generator. Give one of the two.")
    seed = secrets.randbelow(2**32) if settings.seed == -1 else settings.seed
    by_model = MODEL_DEFAULTS[facts.objective]
    settings = replace(settings, **{name: by_model[name] for name in by_model if getattr(settings, name) is None})
    settings = _measure_bars(facts, settings, given)
    _check_audio(settings, given)
    _check_guidance(facts, settings, given)
    batch, negative = _check_items(settings), settings.negative_prompt
    durations = tuple(_expand(settings.duration, batch))
    if any(count_samples(facts, value) < 1 for value in durations):
        raise GenerationError(f"duration={min(durations):g} is shorter than one sample.")
    window = _choose_window(facts, settings, durations)
    _check_loop(facts, settings, durations, window)
    starts, ends = _check_regions(facts, settings, min(durations))
    return ResolvedSettings(
        **{name: getattr(settings, name) for name in SETTING_NAMES}
        | {
            "prompt": tuple(_expand(settings.prompt, batch)),
            "negative_prompt": None if negative is None else tuple(text or "" for text in _expand(negative, batch)),
            "duration": durations,
            "window": window,
            "batch_size": batch,
            "seed": None if has_generator else seed,
            "init_noise_level": None if settings.init_audio is None else settings.init_noise_level,
            "inpaint_mask_start_seconds": starts,
            "inpaint_mask_end_seconds": ends,
        }
    )


def _expand(value: Any, batch: int) -> list[Any]:
    """A value for each item of the batch."""
    return list(value) if is_list(value) else [value] * batch


def _check_items(settings: GenerationSettings) -> int:
    size = count_items(settings)
    for name in PER_ITEM_SETTINGS:
        value = getattr(settings, name)
        if is_list(value) and not value:
            raise GenerationError(f"{name} is an empty list. Give one value, or one per item.")
        if is_list(value) and len(value) != size:
            raise GenerationError(f"{name} has {len(value)} values for {size} items. Give one value, or one per item.")
    if settings.batch_size not in (1, size):
        raise GenerationError(f"batch_size={settings.batch_size} does not match lists of {size} items. Remove it.")
    return size


def _measure_bars(facts: ModelFacts, settings: GenerationSettings, given: Collection[str]) -> GenerationSettings:
    """Settings with the duration of their bars, which is exact to the sample."""
    if settings.bars is None:
        idle = [name for name in ("bpm", "meter") if name in given or getattr(settings, name) != get_default(name)]
        if idle:
            raise GenerationError(f"{idle[0]}={getattr(settings, idle[0])} has no effect without bars.")
        return settings
    if settings.bpm is None:
        raise GenerationError(f"bars={settings.bars} needs a tempo. Give bpm, such as bpm=120.")
    samples = count_bar_samples(settings.bars, settings.bpm, settings.meter, facts.sample_rate)
    duration = to_seconds(samples, facts.sample_rate)
    is_other = any(each != duration for each in _expand(settings.duration, 1))
    if "duration" in given or (is_other and settings.duration != get_default("duration")):
        raise GenerationError(f"duration and bars={settings.bars} both set the length. Remove one.")
    if duration > MAX_SECONDS:
        raise GenerationError(f"bars={settings.bars} last {duration:g} seconds. The most is {MAX_SECONDS:g}.")
    return replace(settings, duration=duration)


def compute_longest_window(facts: ModelFacts, tail: float) -> float:
    """Compute the longest window of a piece, which is the default.

    Args:
        facts: The model's.
        tail: Seconds that are generated behind each window.

    Returns:
        Seconds.
    """
    return max(facts.longest - tail, facts.longest / 2)


def _choose_window(facts: ModelFacts, settings: GenerationSettings, durations: tuple[float, ...]) -> float | None:
    """The length of the windows of a piece; None where all is generated at once."""
    longest = max(durations)
    is_long = count_samples(facts, longest) > facts.max_frames * facts.downsampling_ratio
    if not (is_long or settings.window or settings.prompt_at):
        return None
    most = compute_longest_window(facts, settings.tail)
    window = settings.window or most
    frame = facts.downsampling_ratio / facts.sample_rate
    cause = next(
        text
        for text, applies in (
            (f"duration={longest:g} seconds exceeds the {facts.longest:.1f} seconds of {facts.name}: it", is_long),
            (f"window={settings.window}", settings.window),
            ("prompt_at", True),
        )
        if applies
    )
    if len(durations) > 1:
        raise GenerationError(f"{cause} is generated in windows, one item at a time. Give one, or --at-a-time 1.")
    if idle := next((name for name in AUDIO_SETTINGS if getattr(settings, name) is not None), None):
        fix = f"Remove {idle}, or shorten duration." if is_long else "Remove one of the two."
        raise GenerationError(f"{cause} is generated in windows, which have no {idle}. {fix}")
    if not (least := max(1.0, MIN_FRAMES * frame)) <= window <= most:
        raise GenerationError(f"window={window:g} must be from {least:.2g} to {most:.5g} seconds here.")
    for time, _ in settings.prompt_at or ():
        if not frame <= time <= longest - frame:
            raise GenerationError(f"prompt_at={time:g} lies outside of the piece of {longest:g} s.")
    for (earlier, _), (later, _) in itertools.pairwise(settings.prompt_at or ()):
        if round(earlier / frame) == round(later / frame):
            raise GenerationError(f"prompt_at={earlier:g} and {later:g} lie in the same {frame:.2g} s. Remove one.")
    return window


def _check_loop(
    facts: ModelFacts, settings: GenerationSettings, durations: tuple[float, ...], window: float | None
) -> None:
    if not settings.loop:
        return
    shortest = MIN_FRAMES * facts.downsampling_ratio / facts.sample_rate
    if settings.inpaint_audio is not None or window is not None:
        other = "inpaint_audio" if window is None else "what is generated in windows"
        raise GenerationError(f"loop=True does not go with {other}. Remove one of the two.")
    if min(durations) < shortest:
        raise GenerationError(f"duration={min(durations):g} is too short for loop: at least {shortest:.2f} seconds.")


def _check_guidance(facts: ModelFacts, settings: GenerationSettings, given: Collection[str]) -> None:
    interval = settings.cfg_interval
    if not is_list(interval) or len(interval) != 2 or interval[0] > interval[1]:
        raise GenerationError(f"cfg_interval={interval} must be two noise levels, the lower one first.")
    idle = [name for name in GUIDANCE_SETTINGS if name in given or getattr(settings, name) != get_default(name)]
    if settings.cfg_scale == 1.0 and idle:
        hint = "" if facts.objective == "rectified_flow" else f", the default of {facts.name}, which is post-trained"
        verb = "has" if len(idle) == 1 else "have"
        raise GenerationError(
            f"{', '.join(idle)} {verb} no effect with cfg_scale=1{hint}. Set cfg_scale > 1 (for example 7) or remove "
            f"{'it' if len(idle) == 1 else 'them'}."
        )


def _check_audio(settings: GenerationSettings, given: Collection[str]) -> None:
    for name, audio in NEEDED_AUDIO.items():
        value = getattr(settings, name)
        if (name in given or value != get_default(name)) and getattr(settings, audio) is None:
            raise GenerationError(f"{name}={value} has no effect without {audio}.")


def _check_regions(
    facts: ModelFacts, settings: GenerationSettings, shortest: float
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """The starts and ends of the regions, as many of each."""
    starts, ends = settings.inpaint_mask_start_seconds, settings.inpaint_mask_end_seconds
    if settings.inpaint_audio is None:
        return None, None
    if starts is None or ends is None:
        raise GenerationError("inpaint_audio needs inpaint_mask_start_seconds and inpaint_mask_end_seconds.")
    starts, ends = tuple(_expand(starts, 1)), tuple(_expand(ends, 1))
    if len(starts) != len(ends) or not starts:
        raise GenerationError(
            f"{len(starts)} values of inpaint_mask_start_seconds and {len(ends)} of inpaint_mask_end_seconds: "
            "each region needs one of both."
        )
    for start, end in zip(starts, ends, strict=True):
        _check_region(facts, start, end, shortest)
    return starts, ends


def _check_region(facts: ModelFacts, start: float, end: float, shortest: float) -> None:
    where, ratio = f"the inpainting region from {start:g} to {end:g} s", facts.downsampling_ratio
    if end <= start:
        raise GenerationError(f"{where} ends before it starts.")
    if end > shortest:
        raise GenerationError(f"{where} ends after the duration of {shortest:g} s. Shorten it or increase duration.")
    if -(-count_samples(facts, start) // ratio) >= -(-count_samples(facts, end) // ratio):
        raise GenerationError(
            f"{where} is empty: it lies between two latent frames, which are {ratio / facts.sample_rate:.3f} s apart."
        )
