"""Evaluate adapters: held-out loss at every noise level, and clips generated from held-out captions.

Every adapter at every strength gets the same clips, the same noise and the same seeds as the base, so that they differ
by the weights alone. Shapes: I clips, N noise levels, C channels, T frames, F frames of a batch.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.formats.io import load_adapter
from sa3train.adapters.formats.run_dir import ADAPTER_FILE, list_checkpoints
from sa3train.audio.metrics import measure
from sa3train.core.device import choose_device
from sa3train.core.device_errors import explain_device_errors
from sa3train.core.errors import AdapterError, ConfigError
from sa3train.core.log import hide_progress, silence_logger, track_progress
from sa3train.data.loading.clip_batch import ClipBatch
from sa3train.data.loading.settings import DataSettings
from sa3train.diffusion.objective import add_noise
from sa3train.evaluation.clips import EvaluationClips, load_clips
from sa3train.evaluation.distances import ReferenceClips
from sa3train.evaluation.losses import LEVELS, PredictVelocity, measure_losses
from sa3train.evaluation.results import Candidate, Evaluation, GeneratedClip, Measurement
from sa3train.evaluation.rulers import Ruler, list_rulers, measure_agreement
from sa3train.inference import Generator
from sa3train.inference.runtime import suggest_generation_fixes
from sa3train.models.conditioners import TextEmbedding
from sa3train.reports.pick import Pick, is_comparable, pick_best
from sa3train.reports.run_files import BEST_ADAPTER_FILE, holds_run

KeepAudio = Callable[[int, int, Tensor], None]
"""Called with the number of the candidate (-2 for the held-out clip itself, -1 for the base), that of the prompt, and
the audio (2, samples)."""
REAL, BASE = -2, -1


@dataclass(frozen=True)
class EvaluationSettings:
    """How adapters are evaluated.

    Attributes:
        strengths: Strengths of every adapter.
        clips: Maximum number of held-out clips for the loss.
        generated: Clips that are generated with each candidate; 0 measures the loss alone.
        seconds: Longest generated clip.
        seed: Seed of the fixed noise and of the first generated clip.
        steps: Sampler steps; None for the model's default.
        cfg_scale: Guidance scale; None for the model's default.
        batch_size: (clip, noise level) pairs per forward pass.
        use_all: Whether every clip counts as held out, for shards that no adapter was trained on.
        clap: Name or folder of a CLAP model that measures agreement with prompts; None for none.
    """

    strengths: Sequence[float] = (1.0,)
    clips: int = 32
    generated: int = 8
    seconds: float = 10.0
    seed: int = 0
    steps: int | None = None
    cfg_scale: float | None = None
    batch_size: int = 20
    use_all: bool = False
    clap: str | None = None

    def __post_init__(self) -> None:
        if not self.strengths:
            raise ConfigError("strengths is empty. Give at least one, such as 1.")
        if 0 in self.strengths:
            raise ConfigError("strength 0 is the base, which is always measured. Remove it.")
        for name, least in (("clips", 1), ("generated", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}.")
        if not self.seconds > 0:
            raise ConfigError(f"seconds={self.seconds:g} must be above 0.")


def evaluate_adapters(
    adapters: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    data: DataSettings | EvaluationClips | str | Path,
    model: Generator | str | os.PathLike[str],
    settings: EvaluationSettings | None = None,
    *,
    keep_audio: KeepAudio | None = None,
    **changes: Any,
) -> Evaluation:
    """Evaluate adapters against the base, and pick the best.

    Args:
        adapters: Files of any tool, PEFT folders, RUN_FOLDER@STEP; a run folder stands for all its checkpoints.
        data: Folder of latent shards with held-out clips, the data settings of a run, or clips already loaded.
        model: Name or folder of the model, or a generator without adapters.
        settings: How to evaluate; None for the defaults.
        keep_audio: Called with each clip that is generated, and with the held-out clips they are compared with.
        **changes: Fields of `EvaluationSettings` that differ from `settings`.

    Returns:
        All measures, and the pick.

    Raises:
        AdapterError: If an adapter cannot be read or does not fit the model.
        DataError: If the shards cannot be read, or hold nothing out.
        ConfigError: If settings are out of range.
    """
    started = time.perf_counter()
    chosen = replace(settings or EvaluationSettings(), **changes)
    paths = [adapters] if isinstance(adapters, str | os.PathLike) else adapters
    loaded = [pair for path in paths for pair in list_adapters(path)]
    if not loaded:
        raise ConfigError("there is no adapter to evaluate. Name files, or the folder of a run.")
    generator = model if isinstance(model, Generator) else load_generator(model)
    clips = data
    if not isinstance(clips, EvaluationClips):
        clips = load_clips(clips, generator.model, chosen.clips, use_all=chosen.use_all)
    bench = _Bench(generator, clips, chosen, list_rulers(chosen.clap) if chosen.generated else [], keep_audio)
    fixes = suggest_generation_fixes(generator.device, generator.precision)
    with torch.no_grad(), explain_device_errors(generator.device, "evaluating adapters", fixes):
        measures = bench.measure_all([adapter for _, adapter in loaded])
        base, *found = track_progress(measures, "evaluating", 1 + len(loaded) * len(chosen.strengths), "candidate")
    labels = [(path, _read_step(adapter), strength) for path, adapter in loaded for strength in chosen.strengths]
    candidates = [Candidate(*label, each, base) for label, each in zip(labels, found, strict=True)]
    return Evaluation(
        model=generator.facts.name,
        data=clips.paths,
        settings=bench.describe(),
        levels=list(LEVELS),
        clips=[{"key": clip.keys[0], "prompt": clip.prompts[0]} for clip in clips.heldout],
        prompts=bench.describe_prompts(),
        real=bench.real,
        base=base,
        candidates=candidates,
        pick=_pick(candidates),
        seconds=time.perf_counter() - started,
    )


def _pick(candidates: Sequence[Candidate]) -> Pick | None:
    """Pick by held-out loss among the candidates that do not copy training clips and whose loss is finite."""
    able = [
        index
        for index, each in enumerate(candidates)
        if not each.is_copying and is_comparable(each.base.loss_by_clip, each.measurement.loss_by_clip)
    ]
    if not able:
        return None
    losses = [candidates[index].measurement.loss_by_clip for index in able]
    pick = pick_best(candidates[0].base.loss_by_clip, losses)
    return replace(pick, winner=able[pick.winner], equals=tuple(able[index] for index in pick.equals))


def load_generator(model: str | os.PathLike[str], device: str | None = None) -> Generator:
    """Load a model as evaluations use it: in bf16 on CUDA, else in fp32, so that machines of a kind agree.

    Args:
        model: Name or folder.
        device: Where to compute; None for the best that works.

    Returns:
        The generator.
    """
    target = choose_device(device)
    return Generator.from_pretrained(model, target, "bf16" if target.type == "cuda" else "fp32")


def list_adapters(path: str | os.PathLike[str]) -> list[tuple[str, Adapter]]:
    """List the adapters that a path stands for.

    Args:
        path: An adapter, or a run folder: its checkpoints, and its adapter and its best one unless a checkpoint is of
            the same step.

    Returns:
        Each adapter with what to load it by.

    Raises:
        AdapterError: If one cannot be read, or changes the autoencoder's decoder.
    """
    text, folder = os.fspath(path), Path(path)
    names = [text]
    if holds_run(folder):
        names = [f"{text}@{step}" for step in list_checkpoints(folder)]
        names += [str(folder / file) for file in (ADAPTER_FILE, BEST_ADAPTER_FILE) if (folder / file).is_file()]
        if not names:
            raise AdapterError(f"The run {text} has no adapter yet: its first checkpoint writes one.")
    found: list[tuple[str, Adapter]] = []
    for name in names:
        adapter = load_adapter(name)
        if adapter.part == "decoder":
            raise AdapterError(
                f"{name} changes the autoencoder's decoder, which latents say nothing of. See the round trips in the "
                "report of its run."
            )
        steps = [_read_step(other) for _, other in found]
        if len(names) == 1 or _read_step(adapter) not in steps:
            found.append((name, adapter))
    return sorted(found, key=lambda pair: _read_step(pair[1]) or 0)


def _read_step(adapter: Adapter) -> int | None:
    step = adapter.metadata.get("step", "")
    return int(step) if step.isdigit() else None


class _Bench:
    """The model with the clips and prompts that every candidate is measured on."""

    def __init__(
        self,
        generator: Generator,
        clips: EvaluationClips,
        settings: EvaluationSettings,
        rulers: Sequence[Ruler],
        keep_audio: KeepAudio | None,
    ) -> None:
        self.generator, self.settings, self.rulers = generator, settings, list(rulers)
        self.keep_audio = keep_audio or (lambda candidate, prompt, audio_CN: None)
        self.heldout = clips.heldout
        stride = max(1, len(self.heldout) // max(1, settings.generated))
        self.originals = self.heldout[::stride][: settings.generated]
        training = [clip.data_SCF[0] for clip in clips.training]
        names = [clip.keys[0] for clip in clips.training]
        self.reference = ReferenceClips([clip.data_SCF[0] for clip in self.heldout], training, names)
        self._predict = _make_predict(generator, self.heldout)
        self.real = Measurement([], [self._measure_original(number) for number in range(len(self.originals))])

    def measure_all(self, adapters: Sequence[Adapter]) -> Iterator[Measurement]:
        """Measure the base, then each adapter at each strength.

        Args:
            adapters: The adapters.

        Yields:
            What was measured.
        """
        number = BASE
        yield self._measure(number)
        for adapter in adapters:
            self.generator.load_adapter(adapter)
            try:
                for strength in self.settings.strengths:
                    self.generator.set_strength(strength)
                    yield self._measure(number := number + 1)
            finally:
                self.generator.remove_adapter(0)
                self.generator.stack.apply()

    def describe(self) -> dict[str, Any]:
        """Describe how was measured, for the JSON.

        Returns:
            Settings by name.
        """
        chosen, rulers = self.settings, {ruler.name: ruler.meaning for ruler in self.rulers}
        return {
            "strengths": list(chosen.strengths), "clips": len(self.heldout), "generated": len(self.originals),
            "seconds": chosen.seconds, "seed": chosen.seed, "steps": chosen.steps, "cfg_scale": chosen.cfg_scale,
            "all_clips": chosen.use_all, "rulers": rulers, "device": str(self.generator.device),
            "precision": self.generator.precision,
        }  # fmt: skip

    def describe_prompts(self) -> list[dict[str, Any]]:
        """Describe what is generated, for the JSON.

        Returns:
            Key of the held-out clip, prompt, seconds and seed of each.
        """
        return [
            {"key": clip.keys[0], "prompt": clip.prompts[0], "seconds": self._count_seconds(clip),
             "seed": self.settings.seed + number}
            for number, clip in enumerate(self.originals)
        ]  # fmt: skip

    def _measure(self, candidate: int) -> Measurement:
        self.generator.stack.apply(None)
        per_pass = max(1, self.settings.batch_size // len(LEVELS))
        parts = [
            measure_losses(
                self._predict, self.heldout[start : start + per_pass], self.generator.device, seed=self.settings.seed
            )
            for start in range(0, len(self.heldout), per_pass)
        ]
        losses_IN = torch.cat(parts).double().cpu().tolist()
        if not self.originals:
            return Measurement(losses_IN)
        latents, heard = [], []
        for number, clip in enumerate(self.originals):
            latents_CT, audio_CN = self._generate(number, clip)
            self.keep_audio(candidate, number, audio_CN)
            latents.append(latents_CT)
            heard.append(self._listen(audio_CN, clip.prompts[0]))
        nearest, has_covariance = self.reference.measure_nearest(latents), sum(each.shape[1] for each in latents) > 1
        frechet, without = self.reference.measure_frechet(latents) if has_covariance else (None, [])
        return Measurement(
            losses_IN,
            [replace(clip, nearest=distance) for clip, distance in zip(heard, nearest, strict=True)],
            frechet,
            without,
            self.reference.measure_memorization(latents) if self.reference.training else None,
        )

    def _generate(self, number: int, clip: ClipBatch) -> tuple[Tensor, Tensor]:
        """Generate from a held-out clip's caption: latents (C, T) and audio (2, samples)."""
        generator, settings, seconds = self.generator, self.settings, self._count_seconds(clip)
        with hide_progress(), silence_logger("sa3train.inference"):
            output = generator.generate(
                clip.prompts[0], duration=seconds, seed=settings.seed + number, steps=settings.steps,
                cfg_scale=settings.cfg_scale, return_latents=True,
            )  # fmt: skip
        assert output.latents is not None
        return output.latents[0, :, : self._count_frames(clip)], output.audio[0]

    def _measure_original(self, number: int) -> GeneratedClip:
        """Measure a held-out clip itself, decoded, as far as it is compared with."""
        clip, model = self.originals[number], self.generator.model
        latents_1CT = clip.data_SCF[:, :, : self._count_frames(clip)].to(self.generator.device, model.dit.dtype)
        rng = torch.Generator().manual_seed(self.settings.seed + number)
        audio_CN = model.autoencoder.decode(latents_1CT, generator=rng)[0].float().cpu().clamp(-1, 1)
        audio_CN = audio_CN[:, : int(self._count_seconds(clip) * model.sample_rate)]
        self.keep_audio(REAL, number, audio_CN)
        return self._listen(audio_CN, clip.prompts[0])

    def _listen(self, audio_CN: Tensor, prompt: str) -> GeneratedClip:
        rate = self.generator.facts.sample_rate
        return GeneratedClip(None, measure(audio_CN, rate), measure_agreement(self.rulers, audio_CN, rate, prompt))

    def _count_seconds(self, clip: ClipBatch) -> float:
        return min(float(clip.seconds_S[0]), self.settings.seconds, self.generator.facts.longest)

    def _count_frames(self, clip: ClipBatch) -> int:
        facts = self.generator.facts
        whole = int(self._count_seconds(clip) * facts.sample_rate / facts.downsampling_ratio)
        return max(1, min(whole, clip.data_SCF.shape[2]))


@torch.no_grad()
def _make_predict(generator: Generator, clips: Sequence[ClipBatch]) -> PredictVelocity:
    """Make what predicts velocities with the generator's weights as they are, with each prompt embedded once."""
    model, prompts = generator.model, list(dict.fromkeys(clip.prompts[0] for clip in clips))
    embedded = {prompt: model.conditioner.encode_prompts([prompt]).split()[0] for prompt in prompts}

    def predict(batch: ClipBatch, noise_BCF: Tensor, t_B: Tensor) -> Tensor:
        x_BCF = add_noise(batch.data_SCF, noise_BCF, t_B)
        text = TextEmbedding.join([embedded[prompt] for prompt in batch.prompts])
        condition = model.conditioner.condition(text, batch.seconds_S)
        velocity_BCF: Tensor = model.dit(
            x_BCF,
            t_B,
            cross_attn_cond_BLD=condition.cross_attn_cond_BLD,
            global_cond_BD=condition.global_cond_BD,
            local_add_cond_BCT=x_BCF.new_zeros(len(x_BCF), x_BCF.shape[1] + 1, x_BCF.shape[2]),
            attention_mask_BT=batch.attention_mask_SF.to(x_BCF.device),
        )
        return velocity_BCF

    return predict
