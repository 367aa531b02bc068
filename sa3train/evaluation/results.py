"""What an evaluation found, as objects and as JSON. docs/evaluation.md describes the JSON.

Shapes: I held-out clips, N noise levels, G generated clips.
"""

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sa3train.evaluation.distances import Memorization
from sa3train.reports.loss_change import LossChange, compare_clips, compute_margin
from sa3train.reports.pick import Pick
from sa3train.reports.run_files import ADAPTER_FILE, BEST_ADAPTER_FILE
from sa3train.reports.verdict import ALL_COPIES, COPIES, judge_copying

FORMAT, VERSION = "sa3train-evaluation", 2
"""Name and version of the JSON. The version grows when a key changes its meaning or goes."""
AUDIO_MEASURES = ("loudness_lufs", "true_peak_db", "spectral_centroid_hz", "stereo_width", "clipped_share")
"""Measures of level, spectrum and stereo of which the drift is reported."""


@dataclass(frozen=True)
class GeneratedClip:
    """A clip generated from the caption of a held-out one.

    Attributes:
        nearest: Distance to the nearest held-out clips; None for a held-out clip itself.
        audio: Measures of `sa3train.audio.metrics.measure`; None where one cannot be measured.
        agreement: Agreement with the prompt by ruler, where its prompt can be measured.
    """

    nearest: float | None
    audio: Mapping[str, float | None]
    agreement: Mapping[str, float]


@dataclass(frozen=True)
class Difference:
    """Mean difference of a measure from the base's, over clips of the same prompt and noise.

    Attributes:
        difference: The mean, in the measure's unit.
        margin: Half of its 95 % confidence interval (Student's t for pairs); None for fewer than two clips.
        clips: Number of clips.
    """

    difference: float
    margin: float | None
    clips: int

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.margin is not None and abs(self.difference) > self.margin


@dataclass(frozen=True)
class Measurement:
    """All that is measured of the base, or of one adapter at one strength.

    Attributes:
        losses_IN: Loss of each held-out clip at each noise level.
        generated: The generated clips; empty where none were asked for.
        frechet: Fréchet distance of the generated clips' latent frames to those of the held-out clips.
        frechet_without: The same with each generated clip left out.
        memorization: How close they come to training clips; None without training clips.
    """

    losses_IN: list[list[float]]
    generated: list[GeneratedClip] = field(default_factory=list)
    frechet: float | None = None
    frechet_without: list[float] = field(default_factory=list)
    memorization: Memorization | None = None

    @property
    def loss_by_clip(self) -> list[float]:
        """Mean loss of each clip over the noise levels."""
        return [statistics.fmean(losses) for losses in self.losses_IN]

    @property
    def loss_by_level(self) -> list[float]:
        """Mean loss at each noise level over the clips."""
        return [statistics.fmean(losses) for losses in zip(*self.losses_IN, strict=True)]

    def compare_frechet(self, other: "Measurement") -> Difference | None:
        """Compare the Fréchet distance with that of clips of the same prompts and noise, by the paired jackknife.

        The interval is that of the pseudo-values n·d − (n − 1)·d₋ᵢ (Tukey 1958, "Bias and Confidence in Not-quite Large
        Samples"). It says how much hangs on which clips were generated; held-out clips are taken as they are.

        Args:
            other: The other.

        Returns:
            This distance minus the other; None where one was not measured.
        """
        if self.frechet is None or other.frechet is None:
            return None
        pairs = list(zip(self.frechet_without, other.frechet_without, strict=True))
        values = [(1 - len(pairs)) * (mine - others) for mine, others in pairs]  # the margin needs no constant
        return Difference(self.frechet - other.frechet, compute_margin(values), len(self.generated))

    def judge_copying(self, base: "Measurement") -> str:
        """Judge whether generated clips are so close to training clips that they may be copies.

        Args:
            base: What was measured of the base.

        Returns:
            See `sa3train.reports.verdict.judge_copying`.
        """
        if self.memorization is None or base.memorization is None:
            return ""
        clips = min(len(self.losses_IN), len(self.generated))
        return judge_copying(self.memorization.score, base.memorization.score, clips)

    def average(self, name: str) -> float | None:
        """Average a measure of the generated clips.

        Args:
            name: `nearest`, an audio measure, or a ruler.

        Returns:
            The mean over the clips that have it, or None.
        """
        values = [value for value in self.list_values(name) if value is not None]
        return statistics.fmean(values) if values else None

    def list_values(self, name: str) -> list[float | None]:
        """List a measure of the generated clips.

        Args:
            name: `nearest`, an audio measure, or a ruler.

        Returns:
            The value of each, None where it has none.
        """
        if name == "nearest":
            return [clip.nearest for clip in self.generated]
        return [clip.audio.get(name, clip.agreement.get(name)) for clip in self.generated]

    def to_dict(self) -> dict[str, Any]:
        """Convert to values of JSON.

        Returns:
            The values; what was not measured is None.
        """
        generated = self.generated
        names = dict.fromkeys(name for clip in generated for name in clip.agreement)
        memorization = self.memorization
        return {
            "loss": statistics.fmean(self.loss_by_clip) if self.losses_IN else None,
            "loss_by_level": self.loss_by_level,
            "loss_by_clip": self.loss_by_clip,
            "frechet": self.frechet,
            "nearest": self.average("nearest"),
            "memorization": None if memorization is None else {"score": memorization.score, **asdict(memorization)},
            "audio": {name: self.average(name) for name in AUDIO_MEASURES},
            "agreement": {name: self.average(name) for name in names},
        }


@dataclass(frozen=True)
class Candidate:
    """One adapter at one strength.

    Attributes:
        adapter: What to load it by: a file, a folder, or RUN_FOLDER@STEP.
        step: The training step of its metadata, if there is one.
        strength: The strength.
        measurement: What was measured.
        base: What was measured of the base.
    """

    adapter: str
    step: int | None
    strength: float
    measurement: Measurement
    base: Measurement

    @property
    def is_copying(self) -> bool:
        """Whether its clips may be copies of training clips."""
        return self.measurement.judge_copying(self.base) == COPIES

    @property
    def loss_change(self) -> LossChange:
        """Change of the held-out loss against the base."""
        change = compare_clips(self.base.loss_by_clip, self.measurement.loss_by_clip)
        assert change is not None, "a loss of 0 is not measured"
        return change

    @property
    def loss_change_by_level(self) -> list[LossChange]:
        """The same at each noise level."""
        mine, base = (np.array(each.losses_IN) for each in (self.measurement, self.base))
        changes = [compare_clips(base[:, level], mine[:, level]) for level in range(base.shape[1])]
        return [change for change in changes if change is not None]

    def compare(self, name: str) -> Difference | None:
        """Compare a measure of the generated clips with the base's.

        Args:
            name: `nearest`, an audio measure, or a ruler.

        Returns:
            The difference; None where no clip has the measure with both.
        """
        pairs = zip(self.base.list_values(name), self.measurement.list_values(name), strict=True)
        return compute_difference([mine - base for base, mine in pairs if mine is not None and base is not None])

    def to_dict(self) -> dict[str, Any]:
        """Convert to values of JSON.

        Returns:
            The values.
        """
        names = ["nearest", *AUDIO_MEASURES, *dict.fromkeys(n for clip in self.base.generated for n in clip.agreement)]
        against: dict[str, Any] = {
            "loss": _describe_change(self.loss_change),
            "loss_by_level": [_describe_change(change) for change in self.loss_change_by_level],
        }
        compared = {"frechet": self.measurement.compare_frechet(self.base)}
        for name, found in (compared | {name: self.compare(name) for name in names}).items():
            against[name] = None if found is None else {**asdict(found), "is_significant": found.is_significant}
        what = {"adapter": self.adapter, "step": self.step, "strength": self.strength}
        measured = self.measurement.to_dict()
        if measured["memorization"]:
            measured["memorization"]["verdict"] = self.measurement.judge_copying(self.base)
        return what | measured | {"against_base": against}


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        model: Name of the model.
        data: Folders of the shards.
        settings: Number of clips, seed, steps and the like.
        levels: The noise levels.
        clips: Key and prompt of each held-out clip.
        prompts: Prompt, seconds, seed and key of the held-out clip of each generated one.
        real: Measures of the held-out clips that the prompts are of, decoded.
        base: The model without an adapter.
        candidates: Each adapter at each strength.
        pick: The candidate of the lowest loss among those that do not copy training clips; None if there is none.
        seconds: How long it took.
    """

    model: str
    data: list[str]
    settings: dict[str, Any]
    levels: list[float]
    clips: list[dict[str, str]]
    prompts: list[dict[str, Any]]
    real: Measurement
    base: Measurement
    candidates: list[Candidate]
    pick: Pick | None
    seconds: float

    @property
    def picked(self) -> Candidate | None:
        """The candidate to use; None to use the base."""
        return self.candidates[self.pick.winner] if self.pick is not None and self.pick.beats_base else None

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """A short name for each adapter: the end of its path, or the whole path where two would be called alike."""
        short = {each.adapter: _shorten(each.adapter) for each in self.candidates}
        return short if len(set(short.values())) == len(short) else {path: path for path in short}

    def label(self, candidate: Candidate) -> str:
        """Name a candidate.

        Args:
            candidate: One of the candidates.

        Returns:
            Such as "style@300 at strength 0.5".
        """
        return f"{self.names[candidate.adapter]} at strength {candidate.strength:g}"

    def describe_pick(self) -> str:
        """Describe what to use and how sure that is.

        Returns:
            Some sentences, without the last period.
        """
        if self.pick is None:
            return ALL_COPIES
        best = self.candidates[self.pick.winner]
        if self.picked is None:
            text = f"base: nothing beats it beyond noise. Lowest is {self.label(best)}: {self.pick.describe()}"
        else:
            equals = "; ".join(self.label(self.candidates[index]) for index in self.pick.equals)
            text = f"{self.label(best)}: {self.pick.describe()}{f'. As good within noise: {equals}' if equals else ''}"
        copies = [self.label(each) for each in self.candidates if each.is_copying]
        text += f". Left out as copies of training clips: {'; '.join(copies)}" if copies else ""
        nearest = min((each.measurement for each in self.candidates), key=lambda each: _order(each.frechet))
        nearer = nearest.compare_frechet(best.measurement)
        if nearer is not None and nearer.difference < 0 and nearer.is_significant:
            name = self.label(next(each for each in self.candidates if each.measurement is nearest))
            text += f". By Fréchet distance, clips generated with {name} are nearest to the held-out ones"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Convert to values of JSON.

        Returns:
            The values, see docs/evaluation.md.
        """
        pick, picked = self.pick, self.picked
        chosen = None if pick is None else {
            "adapter": picked.adapter if picked else None,
            "step": picked.step if picked else None,
            "strength": picked.strength if picked else None,
            "is_base": picked is None,
            "candidate": pick.winner,
            "p_value": pick.p_value,
            "probability": pick.probability,
            "loss": _describe_change(pick.change),
            "equals": list(pick.equals),
            "text": self.describe_pick(),
        }  # fmt: skip
        return _clear(
            {
                "format": FORMAT, "version": VERSION, "model": self.model, "data": self.data,
                "settings": self.settings, "levels": self.levels, "clips": self.clips, "prompts": self.prompts,
                "real": self.real.to_dict(), "base": self.base.to_dict(),
                "candidates": [candidate.to_dict() for candidate in self.candidates],
                "pick": chosen, "seconds": round(self.seconds, 3),
            }
        )  # fmt: skip


def compute_difference(differences: Sequence[float]) -> Difference | None:
    """Compute the mean of differences with its interval.

    Args:
        differences: One per pair.

    Returns:
        The mean, or None without any.
    """
    if not differences:
        return None
    return Difference(statistics.fmean(differences), compute_margin(differences), len(differences))


def _order(value: float | None) -> float:
    return math.inf if value is None else value


def _shorten(path: str) -> str:
    file = Path(path)
    name = file.name.removesuffix(".safetensors")
    return f"{file.parent.name}/{name}" if file.name in (ADAPTER_FILE, BEST_ADAPTER_FILE) else name


def _describe_change(change: LossChange) -> dict[str, Any]:
    return {**asdict(change), "is_significant": change.is_significant}


def _clear(value: Any) -> Any:
    """Replace what JSON cannot hold, NaN and infinity, by None."""
    if isinstance(value, dict):
        return {key: _clear(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clear(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
