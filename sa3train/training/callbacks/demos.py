"""Demos: audio generated from the same seeds each time, base and adapter side by side, not normalized.

Files are in `demos/step-XXXXXXXX/` of the run folder, listed by `demos.json` beside them. Training's random state is
not touched: every generation draws from its own CPU generator.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.audio.io import encode_audio
from sa3train.audio.metrics import measure, plot_mel_spectrogram
from sa3train.core.errors import MemoryShortageError, SA3Error
from sa3train.core.files import write_bytes, write_json
from sa3train.core.log import get_logger
from sa3train.inference import Generator
from sa3train.models.checkpoint import StableAudio3
from sa3train.models.hub import list_cached_names
from sa3train.reports.run_files import DEMOS_DIR, DEMOS_FILE, DemoFile
from sa3train.training.batch import ClipBatch
from sa3train.training.loggers import LoggerCollection
from sa3train.training.module import LoraModule, StepCallback
from sa3train.training.settings import DemoSettings

_logger = get_logger(__name__)


@dataclass(frozen=True)
class Demo:
    """One generation that is repeated at each interval.

    Attributes:
        name: Name, the same at every step.
        prompt: The prompt.
        duration: In seconds.
        seed: Seed of the generation.
        clip: A held-out clip (batch of one) whose middle is inpainted; None to generate everything.
    """

    name: str
    prompt: str
    duration: float
    seed: int
    clip: ClipBatch | None = None


def plan_demos(settings: DemoSettings, heldout: Sequence[ClipBatch]) -> list[Demo]:
    """Plan the demos of a run.

    Args:
        settings: Prompts, duration and seed.
        heldout: Held-out clips, batches of one.

    Returns:
        One demo per prompt, one per caption of the first held-out clips, and one clip to inpaint.
    """
    found = [
        Demo(f"prompt{number}", prompt, settings.duration, settings.seed + number)
        for number, prompt in enumerate(settings.prompts)
    ]
    captions = list(dict.fromkeys(clip.prompts[0] for clip in heldout))
    for number, caption in enumerate(captions[: settings.heldout_prompts]):
        found.append(Demo(f"heldout{number}", caption, settings.duration, settings.seed + 100 + number))
    if settings.inpaint and heldout:
        clip = heldout[0]
        duration = min(float(clip.seconds_S[0]), settings.duration)
        found.append(Demo("inpaint", clip.prompts[0], duration, settings.seed + 200, clip))
    return found


def list_demo_models(model: StableAudio3, source: str, also_sibling: bool) -> list[str]:
    """List the models that play the demos.

    Args:
        model: The model that is trained.
        source: Its name or folder.
        also_sibling: Whether its sibling (post-trained for a base, base for a post-trained model) plays too.

    Returns:
        `source`, and the sibling's name if it is downloaded.
    """
    if not also_sibling or model.sibling is None:
        return [source]
    if model.sibling not in list_cached_names():
        _logger.info("demos are played on %s only: its sibling %s is not downloaded", model.name, model.sibling)
        return [source]
    return [source, model.sibling]


class _Stopping(Exception):
    """The run has been asked to stop."""


class DemoCallback(StepCallback):
    """Plays the demos at step 0 (base) and at intervals (adapter at each strength), on rank 0.

    Demo failures, including out-of-memory, are logged and never stop training.

    Args:
        run_dir: The run folder.
        loggers: Where audio, spectrograms and measures go.
        settings: What to play and how often.
        heldout: Held-out clips, batches of one.
        models: What `list_demo_models` returns.
        device: Where to generate.
        is_stopping: Tells whether the run has been asked to stop; the rest is then played when it is resumed.
    """

    def __init__(
        self,
        run_dir: Path,
        loggers: LoggerCollection,
        settings: DemoSettings,
        heldout: Sequence[ClipBatch],
        models: Sequence[str],
        device: torch.device | str = "cpu",
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.run_dir, self.loggers, self.settings = run_dir, loggers, settings
        self.demos = plan_demos(settings, heldout)
        self.models, self.device, self.is_stopping = list(models), device, is_stopping
        self._may_wait = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Play the base once, and what was due when the run was stopped."""
        assert isinstance(pl_module, LoraModule)
        if not (self._get_folder(trainer.global_step) / DEMOS_FILE).is_file():
            self.on_step_end(trainer, pl_module)

    def on_step_end(self, trainer: lightning.Trainer, module: LoraModule) -> None:
        """Play the adapter at the interval and at the end."""
        step = trainer.global_step
        if (step % self.settings.every == 0 or step == trainer.max_steps) and trainer.is_global_zero:
            self._may_wait = step != trainer.max_steps  # a run that is resumed after its last step trains no more
            self._try_play(module.export({}) if step else None, step)

    def _get_folder(self, step: int) -> Path:
        return self.run_dir / DEMOS_DIR / f"step-{step:08d}"

    def _try_play(self, adapter: Adapter | None, step: int) -> None:
        try:
            self.play(adapter, step)
        except _Stopping:
            _logger.info("demos of step %d: left for the resumed run", step)
        except MemoryShortageError:
            _logger.warning(
                "no demos at step %d: out of memory beside training. Set callbacks.demos.duration below %g, or "
                "callbacks.demos.enabled=false.", step, self.settings.duration,
            )  # fmt: skip
        except SA3Error as error:
            _logger.warning("no demos at step %d: %s", step, error)

    def play(self, adapter: Adapter | None, step: int) -> list[DemoFile]:
        """Play every demo and write the files.

        Args:
            adapter: Played at each strength; None for the base.
            step: Optimizer steps taken.

        Returns:
            The files.
        """
        if not self.demos:
            return []
        folder = self._get_folder(step)
        files: list[DemoFile] = []
        with torch.random.fork_rng():
            for number, source in enumerate(self.models):
                # Fixed precision: demos are compared over steps and machines.
                precision = "bf16" if torch.device(self.device).type == "cuda" else "fp32"
                generator = Generator.from_pretrained(source, device=self.device, precision=precision)
                with _silence_logger("sa3train.adapters"), _silence_logger("sa3train.inference"):
                    files += self._play_on(generator, adapter, step, folder, is_trained=number == 0)
                del generator
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        write_json(folder / DEMOS_FILE, [asdict(file) for file in files])
        self._log_measures(files, step)
        return files

    def _play_on(
        self, generator: Generator, adapter: Adapter | None, step: int, folder: Path, *, is_trained: bool
    ) -> Iterator[DemoFile]:
        if adapter is not None:
            generator.load_adapter(adapter, strength=self.settings.strengths[0])
        for demo in self.demos:
            for strength in self.settings.strengths if adapter is not None else [0.0]:
                if self._may_wait and self.is_stopping():
                    raise _Stopping
                if adapter is not None:
                    generator.set_strength(strength)
                audio_CN = self._generate(generator, demo, is_trained)
                yield self._write(generator, demo, audio_CN, strength, step, folder)

    def _generate(self, generator: Generator, demo: Demo, is_trained: bool) -> Tensor:
        duration = min(demo.duration, generator.facts.longest)
        settings: dict[str, Any] = {"prompt": demo.prompt, "seed": demo.seed}
        if is_trained:  # its sibling has another sampler, with its own steps
            settings |= {"steps": self.settings.steps, "cfg_scale": self.settings.cfg_scale}
        if demo.clip is not None:
            z_1CT = demo.clip.data_SCF.to(generator.device, generator.model.dit.dtype)
            rng = torch.Generator().manual_seed(demo.seed)
            with torch.no_grad():
                source_CN = generator.model.autoencoder.decode(z_1CT, generator=rng)[0].float().cpu()
            rate = generator.facts.sample_rate
            duration = min(duration, source_CN.shape[1] / rate)
            settings |= {
                "inpaint_audio": (source_CN[:, : int(duration * rate)].clamp(-1, 1), rate),
                "inpaint_mask_start_seconds": duration / 3,
                "inpaint_mask_end_seconds": 2 * duration / 3,
            }
        return generator.generate(duration=duration, **settings).audio[0]

    def _write(
        self, generator: Generator, demo: Demo, audio_CN: Tensor, strength: float, step: int, folder: Path
    ) -> DemoFile:
        rate, model = generator.facts.sample_rate, generator.model.name
        stem = f"{model}-{demo.name}-{strength:g}"
        write_bytes(folder / f"{stem}.wav", encode_audio(audio_CN, rate))
        picture = plot_mel_spectrogram(audio_CN, rate, f"{model}, strength {strength:g}, step {step}")
        write_bytes(folder / f"{stem}.png", picture)
        name = f"demos/{model}/{demo.name}/{strength:g}"
        self.loggers.log_audio(name, audio_CN, rate, step, demo.prompt)
        self.loggers.log_image(f"{name}/mel", picture, step, demo.prompt)
        measures = {key: value if math.isfinite(value) else None for key, value in measure(audio_CN, rate).items()}
        mode = "text" if demo.clip is None else "inpaint"
        return DemoFile(
            f"{stem}.wav", f"{stem}.png", demo.name, mode, demo.prompt, model, strength, demo.seed, step, measures
        )

    def _log_measures(self, files: Sequence[DemoFile], step: int) -> None:
        """Log the mean over demos of each measure, by model and strength."""
        values: dict[str, list[float]] = {}
        for file in files:
            for key, value in file.measures.items():
                if value is not None:
                    values.setdefault(f"demos/{file.model}/{file.strength:g}/{key}", []).append(value)
        if values:
            self.loggers.log_metrics({name: sum(found) / len(found) for name, found in values.items()}, step)


@contextlib.contextmanager
def _silence_logger(name: str) -> Iterator[None]:
    """Let this logger report errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
