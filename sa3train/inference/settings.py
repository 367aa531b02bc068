"""The settings of a generation, each declared once: name, default, unit, range, choices and help.

The flags of `sa3-generate`, the keywords of `Generator.generate`, the studio's form, the sidecar and the table in
inference/README.md are made from the fields of `GenerationSettings` or held equal to them by a test. This module does
not import torch, so that `sa3-generate --help` is fast.
"""

import contextlib
import dataclasses
import numbers
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sa3train.core.config import MAX_SEED, check_settings, list_settings, setting
from sa3train.core.errors import GenerationError
from sa3train.core.text import shorten

SAMPLER_NAMES = ("euler", "dpmpp", "rk4", "pingpong")
"""The keys of `sa3train.diffusion.samplers.SAMPLERS`, which a test holds equal; listed here to do without torch."""
MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "rectified_flow": {"steps": 50, "cfg_scale": 7.0, "sampler_type": "euler"},
    "rf_denoiser": {"steps": 8, "cfg_scale": 1.0, "sampler_type": "pingpong"},
}
"""Defaults that depend on the model's objective: base models, post-trained models."""
AUDIO_SETTINGS = ("init_audio", "inpaint_audio")
"""Settings that name audio: a sidecar records them as its inputs."""
PER_ITEM_SETTINGS = ("prompt", "negative_prompt", "duration")
"""Settings with one value for all items of a batch, or one for each."""
GUIDANCE_SETTINGS = ("negative_prompt", "cfg_interval", "cfg_norm_threshold", "apg_scale", "scale_phi")
"""Settings without effect where `cfg_scale` is 1."""
MAX_SECONDS = 3600.0
"""Longer than any model generates; the model's own limit is checked by `resolve_settings`."""
MAX_ITEMS = 10_000
MAX_SCALE = 1000.0


@dataclass(frozen=True)
class GenerationSettings:
    """Everything that can be set for a generation; None leaves a setting to the model.

    Types, ranges and choices are checked when it is made; `resolve_settings` checks the rest against a model. Settings
    of several items (`prompt`, `negative_prompt`, `duration`) take one value for all or a list with one for each.

    Raises:
        GenerationError: When a value is not of its type, out of range or not among the choices.
    """

    prompt: str | Sequence[str] = setting(help="Text prompt.", flags=("-p", "--prompt"))
    negative_prompt: str | Sequence[str | None] | None = setting(None, help="What to avoid; needs guidance.")
    duration: float | Sequence[float] = setting(
        30.0, help="Length of the audio.", unit="seconds", above=0, max=MAX_SECONDS, label="Duration (seconds)"
    )
    bars: int | None = setting(None, help="Length in bars, in place of duration; needs bpm.", min=1, max=10_000)
    bpm: float | None = setting(None, help="Quarter notes per minute, for bars.", min=10, max=1000, label="BPM")
    meter: str = setting("4/4", help="Meter of bars.", text="filled", characters=7)
    loop: bool = setting(False, help="Make the end join the start without a seam.", label="Seamless loop")
    tail: float = setting(
        6.0, help="Room generated behind the end and cut off.", unit="seconds", min=0, max=60, label="Tail (seconds)"
    )
    window: float | None = setting(
        None,
        help="Generate in overlapping windows of this length; by default only beyond the model's length.",
        unit="seconds",
        min=1,
        max=MAX_SECONDS,
        label="Window (seconds)",
    )
    prompt_at: Sequence[tuple[float, str]] | None = setting(
        None,
        help="Prompts that follow the first one, each from a time on.",
        min=0,
        max=MAX_SECONDS,
        label="Later prompts",
    )
    batch_size: int = setting(1, help="Number of variations of one prompt.", min=1, max=MAX_ITEMS, label="Variations")
    seed: int = setting(
        -1,
        help="Seed of all random draws; -1 chooses one, which is recorded.",
        min=-1,
        max=MAX_SEED,
        label="Seed (-1: random)",
    )
    steps: int | None = setting(
        None, help="Sampling steps; by default 50 on base models, 8 on post-trained ones.", min=1, max=1000
    )
    sampler_type: str | None = setting(
        None,
        help="Sampler; by default euler on base models, pingpong on post-trained ones.",
        choices=SAMPLER_NAMES,
        label="Sampler",
    )
    cfg_scale: float | None = setting(
        None,
        help="Strength of guidance, 1 is off; by default 7 on base models, 1 on post-trained ones.",
        min=-MAX_SCALE,
        max=MAX_SCALE,
        label="CFG scale",
    )
    cfg_interval: tuple[float, float] = setting(
        (0.0, 1.0),
        help="Lowest and highest noise level with guidance, ends included.",
        min=0,
        max=1,
        items=(2, 2),
        label="CFG interval",
    )
    cfg_norm_threshold: float = setting(
        0.0, help="Largest norm of the guidance; 0 sets no limit.", min=0, max=1e6, label="CFG norm threshold"
    )
    scale_phi: float = setting(
        0.0, help="How far the spread that guidance changes is restored.", min=0, max=1, label="CFG rescale"
    )
    apg_scale: float = setting(
        1.0,
        help="Adaptive projected guidance: 1 is fully projected, 0 is plain guidance.",
        min=-MAX_SCALE,
        max=MAX_SCALE,
        label="APG scale",
    )
    init_audio: Any = setting(None, help="Audio to start from.", text="path", label="Source audio")
    init_noise_level: float = setting(
        0.9, help="How much noise is added to init_audio: 0 keeps it, 1 replaces it.", min=0, max=1, label="Noise level"
    )
    inpaint_audio: Any = setting(None, help="Audio to inpaint or to continue.", text="path")
    inpaint_mask_start_seconds: float | Sequence[float] | None = setting(
        None,
        help="Start of a region to regenerate; the length of the audio to continue it.",
        unit="seconds",
        min=0,
        max=MAX_SECONDS,
        flags=("--inpaint-start", "--inpaint-mask-start-seconds"),
    )
    inpaint_mask_end_seconds: float | Sequence[float] | None = setting(
        None,
        help="End of that region.",
        unit="seconds",
        min=0,
        max=MAX_SECONDS,
        flags=("--inpaint-end", "--inpaint-mask-end-seconds"),
    )
    keep_exact: bool = setting(
        False,
        help="Keep every sample outside the regions but for fades of 23 ms; else all of it is decoded, as released.",
        label="Preserve original outside the mask",
    )
    chunked_decode: bool | None = setting(
        None,
        help="Decode in chunks, with less memory, or as a whole; by default as the model's config says.",
        label="Decoding",
    )
    loudness: float | None = setting(
        None, help="Change the level to this integrated loudness.", unit="LUFS", min=-70, max=0, label="Loudness (LUFS)"
    )
    peak: float | None = setting(
        None, help="Limit true peaks to this level.", unit="dBTP", min=-40, max=0, label="True peak (dBTP)"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_at", _sort_prompts(self.prompt_at))
        for field in dataclasses.fields(self):
            kind, value = VALUE_TYPES.get(field.name), getattr(self, field.name)
            if kind is None or "setting" not in field.metadata or (value is None and field.default is None):
                continue
            optional = field.name == "negative_prompt"
            items = [
                item if item is None and optional else _check_type(field.name, item, kind)
                for item in (value if is_list(value) else [value])
            ]
            object.__setattr__(self, field.name, tuple(items) if is_list(value) else items[0])
        check_settings(self, error=GenerationError)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings for JSON, without the audio.

        Returns:
            Each setting's value by its name, tuples as lists.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: _to_lists(value) for name, value in values.items() if name not in AUDIO_SETTINGS}

    @classmethod
    def from_dict(cls, recorded: Mapping[str, Any], **inputs: Any) -> "GenerationSettings":
        """Read settings that `to_dict` gave, such as those of a sidecar.

        Args:
            recorded: The settings by name; None leaves one at its default.
            **inputs: `init_audio` and `inpaint_audio`, where there is any.

        Returns:
            The settings.

        Raises:
            GenerationError: When a name is unknown or a value not allowed.
        """
        unknown = recorded.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise GenerationError(
                f"unknown settings {', '.join(sorted(unknown))}: recorded by another version of sa3train."
            )
        return cls(**{name: value for name, value in (dict(recorded) | inputs).items() if value is not None})


def _sort_prompts(prompts: Any) -> tuple[tuple[float, str], ...] | None:
    """The later prompts in the order of their times."""
    if prompts is None or (is_list(prompts) and not prompts):
        return None
    given = list(prompts.items()) if isinstance(prompts, Mapping) else prompts
    if not is_list(given) or not all(is_list(each) and len(each) == 2 for each in given):
        raise GenerationError(f"prompt_at must be pairs of seconds and prompt, not {shorten(repr(prompts))}.")
    pairs = [(check_number("a time of prompt_at", time), _check_type("prompt_at", text, str)) for time, text in given]
    times = [time for time, _ in pairs]
    if min(times) == 0 or len(set(times)) < len(times):
        wrong = next(time for time in times if time == 0 or times.count(time) > 1)
        raise GenerationError(
            f"prompt_at has {'the time 0, which is that of prompt' if wrong == 0 else f'{wrong:g} s twice'}. Remove it."
        )
    return tuple(sorted(pairs))


def _to_lists(value: Any) -> Any:
    return [_to_lists(item) for item in value] if isinstance(value, tuple) else value


def _find_value_types(schema: type) -> dict[str, type]:
    def flatten(hint: Any) -> set[Any]:
        return set().union(*map(flatten, typing.get_args(hint))) if typing.get_args(hint) else {hint}

    hints = {name: flatten(hint) for name, hint in typing.get_type_hints(schema).items()}
    return {name: kind for name, found in hints.items() for kind in (bool, int, float, str) if kind in found}


SETTING_NAMES = tuple(field.name for field in dataclasses.fields(GenerationSettings))
VALUE_TYPES = {name: kind for name, kind in _find_value_types(GenerationSettings).items() if name != "prompt_at"}
"""The type of a single value (bool, int, float or str) by the setting's name; audio and later prompts have none."""
_KINDS: dict[type, tuple[type, str]] = {
    int: (numbers.Integral, "a whole number"),
    bool: (bool, "true or false"),
    str: (str, "text"),
}


def get_default(name: str) -> Any:
    """Get the default of a setting.

    Args:
        name: The setting.

    Returns:
        Its default; None where the model chooses or there is none.
    """
    return getattr(GenerationSettings, name, None)


def describe_setting(name: str) -> str:
    """Describe a setting in a sentence or two, for `--help` and forms.

    Args:
        name: The setting.

    Returns:
        Its help with unit, choices, range and default.
    """
    declared, default = list_settings(GenerationSettings)[name], get_default(name)
    facts = [declared.unit, ", ".join(declared.choices)]
    if declared.min is not None and declared.max is not None and name != "seed":
        facts.append(f"{declared.min:g} to {declared.max:g}")
    if not (default is None or isinstance(default, bool)):
        values = default if is_list(default) else [default]
        facts.append(f"default {' '.join(value if isinstance(value, str) else f'{value:g}' for value in values)}")
    details = "; ".join(fact for fact in facts if fact)
    return f"{declared.help.rstrip('.')} ({details})." if details else declared.help


def list_flags(name: str) -> tuple[str, ...]:
    """List the command-line flags of a setting.

    Args:
        name: The setting.

    Returns:
        The flags, the usual one first.
    """
    return list_settings(GenerationSettings)[name].flags or (f"--{name.replace('_', '-')}",)


def is_list(value: Any) -> bool:
    """Check whether a value is a list of values.

    Args:
        value: What was given for a setting.

    Returns:
        Whether it is a sequence other than text.
    """
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def check_number(name: str, value: Any) -> float:
    """Check that a value is a finite number.

    Args:
        name: What the value is, for the message.
        value: The value; booleans and text are no numbers.

    Returns:
        The value as float.

    Raises:
        GenerationError: When it is not.
    """
    with contextlib.suppress(OverflowError):  # an integer beyond every float
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(float(value)) < 1e300:
            return float(value)
    raise GenerationError(f"{name} must be a number, not {shorten(repr(value))}.")


def _check_type(name: str, value: Any, kind: type) -> Any:
    if kind is float:
        return check_number(name, value)
    allowed, words = _KINDS[kind]
    if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
        raise GenerationError(f"{name} must be {words}, not {shorten(repr(value))}.")
    return kind(value)


def count_items(settings: GenerationSettings) -> int:
    """Count the items of a batch.

    Args:
        settings: The settings.

    Returns:
        The batch size, or the length of the longest list.
    """
    values = [getattr(settings, name) for name in PER_ITEM_SETTINGS]
    return max([settings.batch_size, *(len(value) for value in values if is_list(value))])
