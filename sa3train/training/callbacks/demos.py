"""Demos: audio generated from the same seeds each time, base and adapter side by side, not normalized.

Files are in `demos/step-XXXXXXXX/` of the run folder, listed by `demos.json` beside them. Training's random state is
not touched: every generation draws from its own CPU generator.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor
from typing_extensions import override

from sa3train.adapters.adapter import Adapter
from sa3train.audio.io import encode_audio
from sa3train.audio.metrics import measure, plot_mel_spectrogram
from sa3train.core.device import empty_cache
from sa3train.core.errors import MemoryShortageError, SA3Error
from sa3train.core.files import write_bytes, write_json
from sa3train.core.log import get_logger, report_stage, silence_logger
from sa3train.data.loading.clip_batch import ClipBatch
from sa3train.inference import Generator
from sa3train.models.checkpoint import StableAudio3
from sa3train.models.hub import PACKED, list_cached_names
from sa3train.reports.run_files import DEMOS_DIR, DEMOS_FILE, DemoFile
from sa3train.training.loggers import LoggerCollection
from sa3train.training.module import AdapterModule, StepCallback
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
    sibling = f"{model.sibling}{PACKED}" if source.endswith(".npz") else model.sibling
    if sibling not in list_cached_names():
        _logger.info("demos are generated with %s only: its sibling %s is not downloaded", model.name, sibling)
        return [source]
    return [source, sibling]


class _Stopping(Exception):
    """The run has been asked to stop."""


class FixedDemoCallback(StepCallback, ABC):
    """Makes the same demos at step 0 (base) and at intervals (adapter), on rank 0. A subclass says what they are.

    Demo failures, including out-of-memory, are logged and never stop training.

    Args:
        run_dir: The run folder.
        loggers: Where audio, spectrograms and measures go.
        every: Optimizer steps between demos.
        is_stopping: Tells whether the run has been asked to stop; the rest is then made when it is resumed.
    """

    def __init__(
        self, run_dir: Path, loggers: LoggerCollection, every: int, is_stopping: Callable[[], bool] = lambda: False
    ) -> None:
        self.run_dir, self.loggers, self.every, self.is_stopping = run_dir, loggers, every, is_stopping

    @abstractmethod
    def play_module(self, module: AdapterModule, step: int) -> None:
        """Play every demo and write the files.

        Args:
            module: The module; its adapter does not count at step 0.
            step: Optimizer steps taken.
        """

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Play the base once, and what was due when the run was stopped."""
        assert isinstance(pl_module, AdapterModule)
        self.play_missing(trainer, pl_module)

    def play_missing(self, trainer: lightning.Trainer, module: AdapterModule) -> None:
        """Play what is due at the current step, unless it was played before the run was stopped.

        Args:
            trainer: The trainer.
            module: The module that is trained.
        """
        if not (self.get_folder(trainer.global_step) / DEMOS_FILE).is_file():
            self.on_step_end(trainer, module)

    def on_step_end(self, trainer: lightning.Trainer, module: AdapterModule) -> None:
        """Play the adapter at the interval and at the end."""
        step = trainer.global_step
        if (step % self.every == 0 or step == trainer.max_steps) and trainer.is_global_zero:
            self._try_play(module, step)

    def get_folder(self, step: int) -> Path:
        """Get the folder of the demos of a step.

        Args:
            step: Optimizer steps taken.

        Returns:
            Its path.
        """
        return self.run_dir / DEMOS_DIR / f"step-{step:08d}"

    @report_stage("generating demos")
    def _try_play(self, module: AdapterModule, step: int) -> None:
        try:
            self.play_module(module, step)
        except _Stopping:
            _logger.info("demos of step %d: left for the resumed run", step)
        except MemoryShortageError:
            _logger.warning(
                "no demos at step %d: out of memory beside training. Make them shorter, or set "
                "callbacks.demos.enabled=false.", step,
            )  # fmt: skip
        except SA3Error as error:
            _logger.warning("no demos at step %d: %s", step, error)

    def stop_if_asked(self) -> None:
        """Stop playing if the run has been asked to stop."""
        if self.is_stopping():
            raise _Stopping

    def write_demo(self, demo: DemoFile, audio_CN: Tensor, sample_rate: int) -> DemoFile:
        """Write the files of a demo, and log them.

        Args:
            demo: What is known of it.
            audio_CN: The audio.
            sample_rate: Sample rate in Hz.

        Returns:
            The demo with its measures.
        """
        folder, title = self.get_folder(demo.step), f"{demo.model}, strength {demo.strength:g}, step {demo.step}"
        write_bytes(folder / demo.file, encode_audio(audio_CN, sample_rate))
        picture = plot_mel_spectrogram(audio_CN, sample_rate, title)
        write_bytes(folder / demo.picture, picture)
        name = f"demos/{demo.model}/{demo.demo}/{demo.strength:g}"
        self.loggers.log_audio(name, audio_CN, sample_rate, demo.step, demo.prompt)
        self.loggers.log_image(f"{name}/mel", picture, demo.step, demo.prompt)
        found = measure(audio_CN, sample_rate).items()
        return replace(demo, measures={key: value if math.isfinite(value) else None for key, value in found})

    def write_list(self, demos: Sequence[DemoFile], step: int) -> None:
        """Write the list of a step's demos, and log the mean of each measure by model and strength.

        Args:
            demos: The demos.
            step: Optimizer steps taken.
        """
        write_json(self.get_folder(step) / DEMOS_FILE, [asdict(demo) for demo in demos])
        values: dict[str, list[float]] = {}
        for demo in demos:
            for key, value in demo.measures.items():
                if value is not None:
                    values.setdefault(f"demos/{demo.model}/{demo.strength:g}/{key}", []).append(value)
        if values:
            self.loggers.log_metrics({name: sum(found) / len(found) for name, found in values.items()}, step)


class DemoCallback(FixedDemoCallback):
    """Generates the demos: by the base once, and by the adapter at each strength.

    Args:
        run_dir: The run folder.
        loggers: Where audio, spectrograms and measures go.
        settings: What to generate and how often.
        heldout: Held-out clips, batches of one.
        models: What `list_demo_models` returns.
        device: Where to generate.
        is_stopping: Tells whether the run has been asked to stop; the rest is then made when it is resumed.
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
        super().__init__(run_dir, loggers, settings.every, is_stopping)
        self.settings = settings
        self.demos = plan_demos(settings, heldout)
        self.models, self.device = list(models), device

    @override
    def play_module(self, module: AdapterModule, step: int) -> None:
        """Play the base at step 0, else the adapter as it is now."""
        self.play(module.export({}) if step else None, step)

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
        files: list[DemoFile] = []
        with torch.random.fork_rng():
            for number, source in enumerate(self.models):
                # Fixed precision: demos are compared over steps and machines.
                precision = "bf16" if torch.device(self.device).type == "cuda" else "fp32"
                generator = Generator.from_pretrained(source, device=self.device, precision=precision)
                with silence_logger("sa3train.adapters"), silence_logger("sa3train.inference"):
                    files += self._play_on(generator, adapter, step, is_trained=number == 0)
                del generator
        empty_cache(torch.device(self.device))
        self.write_list(files, step)
        return files

    def _play_on(
        self, generator: Generator, adapter: Adapter | None, step: int, *, is_trained: bool
    ) -> Iterator[DemoFile]:
        if adapter is not None:
            generator.load_adapter(adapter, strength=self.settings.strengths[0])
        for demo in self.demos:
            for strength in self.settings.strengths if adapter is not None else [0.0]:
                self.stop_if_asked()
                if adapter is not None:
                    generator.set_strength(strength)
                audio_CN = self._generate(generator, demo, is_trained)
                model, mode = generator.model.name, "text" if demo.clip is None else "inpaint"
                stem = f"{model}-{demo.name}-{strength:g}"
                file = DemoFile(
                    f"{stem}.wav", f"{stem}.png", demo.name, mode, demo.prompt, model, strength, demo.seed, step, {}
                )
                yield self.write_demo(file, audio_CN, generator.facts.sample_rate)

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
