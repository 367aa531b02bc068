"""What is asked of a model: checked against what it can do, every default filled in, settings without effect refused.

Times are in seconds, lengths in samples at the model's rate or in latent frames.

Small checks of values a user gives; each raises `RequestError` naming the setting.
"""

import math
import numbers
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sa3train.core.errors import RequestError
from sa3train.diffusion.guidance import Guidance
from sa3train.diffusion.samplers import SAMPLERS

LARGEST = 2**63 - 1


def is_list(value: Any) -> bool:
    """Whether `value` is a list of values rather than one."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def per_item(value: Any, batch: int) -> list[Any]:
    """`value` for each item of the batch."""
    return list(value) if is_list(value) else [value] * batch


def text(name: str, value: Any) -> str:
    """`value`, which must be text."""
    if not isinstance(value, str):
        raise RequestError(f"{name} must be text, not {value!r}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} holds what is no character ({value[error.start]!r}): write it as UTF-8.") from error
    return value


def flag(name: str, value: Any) -> bool:
    """`value`, which must be true or false."""
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, not {value!r}.")
    return value


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """`value`, which must be a finite number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise RequestError(f"{name} must be a number, not {value!r}.")
    checked = float(value)
    if not low <= checked <= high:
        bounds = f"from {low:g} to {high:g}" if math.isfinite(high) else f"at least {low:g}"
        raise RequestError(f"{name} must be {bounds}, not {checked:g}.")
    return checked


def whole(name: str, value: Any, low: int, high: int = LARGEST) -> int:
    """`value`, which must be a whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise RequestError(f"{name} must be a whole number, not {value!r}.")
    checked = int(value)
    if not low <= checked <= high:
        bounds = f"at least {low}" if checked < low else f"at most {high}"
        raise RequestError(f"{name} must be {bounds}, not {checked}.")
    return checked


DEFAULT_DURATION = 30.0
BASE_STEPS, BASE_CFG, BASE_SAMPLER = 50, 7.0, "euler"
POST_STEPS, POST_CFG, POST_SAMPLER = 8, 1.0, "pingpong"
# The released models generate this much more than asked and cut it off, so that endings are not cut short.
EXTRA_SECONDS = 6


@dataclass(frozen=True)
class ModelFacts:
    """What a request depends on: `objective` is "rectified_flow" (base) or "rf_denoiser" (post-trained)."""

    name: str
    objective: str
    sample_rate: int
    downsampling_ratio: int
    max_frames: int

    @property
    def longest(self) -> float:
        """The longest duration in seconds."""
        return self.max_frames * self.downsampling_ratio / self.sample_rate


@dataclass(frozen=True)
class Request:
    """A generation, fully said. Tuples hold one value per item of the batch; `regions` are (start, end) in seconds.

    `seed` is None when the caller brings a torch generator. `init_noise_level` is None without init audio.
    """

    prompt: tuple[str, ...]
    negative_prompt: tuple[str, ...] | None
    duration: tuple[float, ...]
    steps: int
    guidance: Guidance
    sampler_type: str
    seed: int | None
    init_noise_level: float | None
    regions: tuple[tuple[float, float], ...]
    keep_exact: bool
    chunked_decode: bool | None

    @property
    def batch_size(self) -> int:
        return len(self.prompt)

    def settings(self) -> dict[str, Any]:
        """As keyword arguments of `Generator.generate` that make the same again, for JSON."""
        return {
            "prompt": list(self.prompt),
            "negative_prompt": None if self.negative_prompt is None else list(self.negative_prompt),
            "duration": list(self.duration),
            "steps": self.steps,
            "cfg_scale": self.guidance.cfg_scale,
            "cfg_interval": list(self.guidance.cfg_interval),
            "cfg_norm_threshold": self.guidance.cfg_norm_threshold,
            "apg_scale": self.guidance.apg_scale,
            "scale_phi": self.guidance.scale_phi,
            "sampler_type": self.sampler_type,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "init_noise_level": self.init_noise_level,
            "inpaint_mask_start_seconds": [start for start, _ in self.regions] or None,
            "inpaint_mask_end_seconds": [end for _, end in self.regions] or None,
            "keep_exact": self.keep_exact,
            "chunked_decode": self.chunked_decode,
        }


def described(request: Request) -> str:
    """Items and seconds, for a message."""
    count, seconds = request.batch_size, max(request.duration)
    return f"{seconds:g} s" if count == 1 else f"{count} items of up to {seconds:g} s"


def samples_of(facts: ModelFacts, seconds: float) -> int:
    """Samples that `seconds` are cut to."""
    return int(seconds * facts.sample_rate)


def generated_frames(facts: ModelFacts, seconds: float) -> int:
    """Latent frames that are generated for `seconds`: 6 s more, in whole pairs of frames, at most the longest."""
    frames = -(-int((seconds + EXTRA_SECONDS) * facts.sample_rate) // facts.downsampling_ratio)
    return min(frames + frames % 2, facts.max_frames)


def real_frames(facts: ModelFacts, seconds: float, frames: int) -> int:
    """Latent frames of `frames` that are not padding for an item of `seconds`."""
    effective = -(-samples_of(facts, seconds) // facts.downsampling_ratio)
    return min(effective + int(EXTRA_SECONDS * facts.sample_rate / facts.downsampling_ratio), frames)


def build_request(
    facts: ModelFacts,
    *,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str | None] | None = None,
    duration: float | Sequence[float] = DEFAULT_DURATION,
    steps: int | None = None,
    cfg_scale: float | None = None,
    cfg_interval: Sequence[float] = (0.0, 1.0),
    cfg_norm_threshold: float = 0.0,
    apg_scale: float = 1.0,
    scale_phi: float = 0.0,
    sampler_type: str | None = None,
    seed: int = -1,
    batch_size: int = 1,
    with_init_audio: bool = False,
    init_noise_level: float = 1.0,
    with_inpaint_audio: bool = False,
    inpaint_mask_start_seconds: float | Sequence[float] | None = None,
    inpaint_mask_end_seconds: float | Sequence[float] | None = None,
    keep_exact: bool = False,
    chunked_decode: bool | None = None,
    own_generator: bool = False,
) -> Request:
    """Check the settings of `Generator.generate` against `facts` and fill in what was left open.

    Raises `RequestError` for a value out of range, lists that do not match, and settings that would do nothing.
    """
    base = facts.objective == "rectified_flow"
    batch = _batch_size(batch_size, prompt=prompt, negative_prompt=negative_prompt, duration=duration)
    if keep_exact and not with_inpaint_audio:
        raise RequestError("keep_exact would do nothing without audio to inpaint: give inpaint_audio.")
    guidance = _guidance(
        facts,
        number("cfg_scale", cfg_scale) if cfg_scale is not None else BASE_CFG if base else POST_CFG,
        cfg_interval,
        number("cfg_norm_threshold", cfg_norm_threshold, low=0.0),
        number("apg_scale", apg_scale),
        number("scale_phi", scale_phi, low=0.0, high=1.0),
        negative_prompt is not None,
    )
    durations = tuple(_duration(facts, value) for value in per_item(duration, batch))
    return Request(
        prompt=tuple(text("prompt", value) for value in per_item(prompt, batch)),
        negative_prompt=_negative(negative_prompt, batch),
        duration=durations,
        steps=whole("steps", steps if steps is not None else BASE_STEPS if base else POST_STEPS, low=1),
        guidance=guidance,
        sampler_type=_sampler(sampler_type, base),
        seed=_seed(seed, own_generator),
        init_noise_level=_init_level(init_noise_level, with_init_audio),
        regions=_regions(
            facts, inpaint_mask_start_seconds, inpaint_mask_end_seconds, with_inpaint_audio, min(durations)
        ),
        keep_exact=flag("keep_exact", keep_exact),
        chunked_decode=None if chunked_decode is None else flag("chunked_decode", chunked_decode),
    )


def _batch_size(batch_size: int, **given: Any) -> int:
    """The lists' common length; a batch size of 1 follows it."""
    lengths = {name: len(value) for name, value in given.items() if is_list(value)}
    size = whole("batch_size", batch_size, low=1)
    for name, length in lengths.items():
        if length == 0:
            raise RequestError(f"{name} is an empty list; give one value, or one for each item.")
        if size == 1:
            size = length
        if length != size:
            raise RequestError(f"{name} has {length} values for a batch of {size}: give one value, or one per item.")
    return size


def _guidance(
    facts: ModelFacts,
    cfg_scale: float,
    cfg_interval: Sequence[float],
    cfg_norm_threshold: float,
    apg_scale: float,
    scale_phi: float,
    negative: bool,
) -> Guidance:
    if not is_list(cfg_interval) or len(cfg_interval) != 2:
        raise RequestError(f"cfg_interval must be two noise levels (from, to), not {cfg_interval!r}.")
    low, high = (number("cfg_interval", value, low=0.0, high=1.0) for value in cfg_interval)
    if low > high:
        raise RequestError(f"cfg_interval runs from {low:g} to {high:g}: the lower noise level comes first.")
    guidance = Guidance(cfg_scale, (low, high), apg_scale, cfg_norm_threshold, scale_phi)
    idle = {
        "negative_prompt": negative,
        "cfg_interval": (low, high) != (0.0, 1.0),
        "cfg_norm_threshold": cfg_norm_threshold != 0.0,
        "apg_scale": apg_scale != 1.0,
        "scale_phi": scale_phi != 0.0,
    }
    if cfg_scale == 1.0 and any(idle.values()):
        names = ", ".join(name for name, given in idle.items() if given)
        hint = "" if facts.objective == "rectified_flow" else f" ({facts.name} is post-trained, where 1 is the default)"
        raise RequestError(f"{names} would do nothing at cfg_scale 1{hint}: set cfg_scale, such as 7, or leave it out.")
    return guidance


def _negative(negative_prompt: Any, batch: int) -> tuple[str, ...] | None:
    if negative_prompt is None:
        return None
    return tuple(text("negative_prompt", value or "") for value in per_item(negative_prompt, batch))


def _duration(facts: ModelFacts, value: Any) -> float:
    seconds = number("duration", value)
    if samples_of(facts, seconds) < 1:
        raise RequestError(f"duration must be above 0 seconds, not {seconds:g}.")
    if samples_of(facts, seconds) > facts.max_frames * facts.downsampling_ratio:
        raise RequestError(f"duration {seconds:g} s is beyond {facts.name}, whose longest is {facts.longest:.1f} s.")
    return seconds


def _sampler(name: str | None, base: bool) -> str:
    if name is None:
        return BASE_SAMPLER if base else POST_SAMPLER
    if name not in SAMPLERS:
        raise RequestError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}.")
    return name


def _seed(seed: Any, own_generator: bool) -> int | None:
    value = whole("seed", seed, low=-1, high=LARGEST)
    if own_generator:
        if value != -1:
            raise RequestError(f"seed {value} would do nothing beside a generator: give one of the two.")
        return None
    return secrets.randbelow(2**32) if value == -1 else value


def _init_level(level: Any, with_init_audio: bool) -> float | None:
    value = number("init_noise_level", level, low=0.0, high=1.0)
    if with_init_audio:
        return value
    if value != 1.0:
        raise RequestError(f"init_noise_level {value:g} would do nothing without init audio: give init_audio.")
    return None


def _regions(
    facts: ModelFacts, starts: Any, ends: Any, with_inpaint_audio: bool, shortest: float
) -> tuple[tuple[float, float], ...]:
    if not with_inpaint_audio:
        if starts is not None or ends is not None:
            raise RequestError("inpainting times would do nothing without audio to inpaint: give inpaint_audio.")
        return ()
    if starts is None or ends is None:
        raise RequestError("inpaint_audio needs the start and the end of what to generate anew, in seconds.")
    starts, ends = (list(value) if is_list(value) else [value] for value in (starts, ends))
    if len(starts) != len(ends) or not starts:
        raise RequestError(f"{len(starts)} starts and {len(ends)} ends of inpainting: each region needs one of both.")
    return tuple(_region(facts, start, end, shortest) for start, end in zip(starts, ends, strict=True))


def _region(facts: ModelFacts, start: Any, end: Any, shortest: float) -> tuple[float, float]:
    start, end = number("inpaint start", start), number("inpaint end", end)
    where = f"the region from {start:g} to {end:g} s"
    if start < 0:
        raise RequestError(f"{where} starts before the audio.")
    if end <= start:
        raise RequestError(f"{where} ends before it starts: give the earlier time as start.")
    if end > shortest:
        raise RequestError(
            f"{where} ends after the duration of {shortest:g} s: shorten it or ask for a longer duration."
        )
    ratio = facts.downsampling_ratio
    if -(-samples_of(facts, start) // ratio) >= -(-samples_of(facts, end) // ratio):
        apart = ratio / facts.sample_rate
        raise RequestError(f"{where} would generate nothing: it lies between two latent frames, {apart:.3f} s apart.")
    return start, end
