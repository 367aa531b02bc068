"""What is checked of a generation: all of it before its model is loaded, where its sizes and adapters are known."""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from sa3train.adapters.apply.stack import check_interval, check_use, is_within
from sa3train.adapters.formats.io import load_adapter
from sa3train.core.errors import GenerationError
from sa3train.core.text import list_few
from sa3train.inference.input_audio import load_input_audio
from sa3train.inference.resolve import ModelFacts, ResolvedSettings, resolve_settings
from sa3train.inference.sampling import build_guidance, list_noise_levels
from sa3train.inference.settings import AUDIO_SETTINGS, GenerationSettings
from sa3train.inference.windows import list_windows

AdapterUse = Mapping[str, Any]
"""How an adapter is used: `path` (or None), `strength` (a number, or two over a piece) and `interval`."""


def check_generation(
    settings: GenerationSettings,
    facts: ModelFacts,
    adapters: Sequence[AdapterUse] = (),
    *,
    has_generator: bool = False,
    given: Collection[str] = (),
) -> ResolvedSettings:
    """Check settings against a model and adapters, as far as neither needs to be loaded.

    Args:
        settings: What was asked for.
        facts: The model's.
        adapters: How each adapter is used.
        has_generator: Whether the caller brings a torch generator, which replaces the seed.
        given: Settings that the user named, and that must have an effect even at their defaults.

    Returns:
        Settings from which the same audio is generated again.

    Raises:
        GenerationError: When the model cannot do what is asked, or a setting would have no effect.
        AdapterError: When an interval is not two noise levels in order.
    """
    resolved = resolve_settings(settings, facts, has_generator=has_generator, given=given)
    _check_noise_levels(resolved, adapters)
    _check_windows(resolved, facts, adapters)
    return resolved


def check_files(
    batches: Sequence[GenerationSettings],
    facts: ModelFacts,
    adapters: Sequence[Mapping[str, Any]] = (),
    given: Collection[str] = (),
) -> None:
    """Check settings and the files that they name before the model is loaded.

    Args:
        batches: What was asked for.
        facts: The model's.
        adapters: Keyword arguments of `Generator.load_adapter` for each adapter.
        given: Settings that the user named.

    Raises:
        GenerationError: When the model cannot do what is asked, or a setting would have no effect.
        AdapterError: When a file holds no adapter, or it cannot be used so.
        AudioError: When input audio is unusable.
    """
    used = []
    for each in adapters:
        use = {"path": each["adapter"], "strength": 1.0, "interval": (0.0, 1.0)} | dict(each)
        check_use(load_adapter(each["adapter"]), use["strength"], use["interval"])
        used.append(use)
    for batch in batches:
        check_generation(batch, facts, used, given=given)
    for role in AUDIO_SETTINGS:
        if (audio := getattr(batches[0], role)) is not None:
            load_input_audio(audio, facts.sample_rate, role)


def _check_noise_levels(settings: ResolvedSettings, adapters: Sequence[AdapterUse]) -> None:
    """Check that guidance and adapters that are limited to some noise levels act at one that is sampled."""
    limits = {}
    if settings.cfg_scale != 1.0 and settings.cfg_interval != (0.0, 1.0):
        limits[f"cfg_interval={settings.cfg_interval}"] = build_guidance(settings).acts_at
    for each in adapters:
        interval = check_interval(each["interval"])
        if interval != (0.0, 1.0) and np.any(each["strength"]):
            name = f"interval={interval} of {each['path'] or 'an adapter'}"
            limits[name] = functools.partial(is_within, interval=interval)
    levels = list_noise_levels(settings) if limits else []
    if idle := [name for name, acts_at in limits.items() if not any(map(acts_at, levels))]:
        shown = list_few([f"{level:.3g}" for level in dict.fromkeys(levels)], 8) or "none, with init_noise_level=0"
        raise GenerationError(
            f"{' and '.join(idle)} would have no effect, since none of the noise levels that are sampled lies "
            f"within: {shown}. Widen it, or increase steps."
        )


def _check_windows(settings: ResolvedSettings, facts: ModelFacts, adapters: Sequence[AdapterUse]) -> None:
    """Refuse what needs windows where there are none, and the other way round."""
    if settings.window is not None and settings.seed is None:
        raise GenerationError("a piece of several windows needs a seed, from which each draws. Give seed.")
    changing = [each["path"] or "an adapter" for each in adapters if _is_changing(each["strength"])]
    if changing and (settings.window is None or len(list_windows(settings, facts)) == 1):
        other = next((name for name in ("loop", *AUDIO_SETTINGS) if getattr(settings, name)), None)
        fix = f"Set window to less than its length, such as window={max(1, round(max(settings.duration) / 4))}."
        raise GenerationError(
            f"the strength of {changing[0]} changes from window to window, but the audio is generated at once. "
            + (f"Give one strength, or remove {other}, which does not go with windows." if other else fix)
        )


def _is_changing(strength: Any) -> bool:
    return isinstance(strength, tuple | list) and len(set(strength)) > 1
