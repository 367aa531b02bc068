"""What the adapter sounds like while it learns: the same seeds each time, base against adapter, nothing normalised.

Files are in `demos/step-XXXXXXXX/` of the run folder with `demos.json` beside them. Training's random state is not
touched: every generation draws from a CPU generator of its own.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor

from sa3train.adapters.adapter import Adapter
from sa3train.audio.metrics import measure, mel_picture
from sa3train.core.errors import MemoryShortageError, SA3Error
from sa3train.core.files import write_bytes, write_json
from sa3train.core.log import get_logger
from sa3train.inference import Generator
from sa3train.models import hub
from sa3train.models.checkpoint import StableAudio3
from sa3train.models.hub import WEIGHTS_FILE
from sa3train.reports.run_files import FOLDER, INDEX, Played
from sa3train.training.callbacks.validation import FixedItem
from sa3train.training.loggers import Tracker
from sa3train.training.module import LoraModule
from sa3train.training.settings import DemoSettings

_logger = get_logger(__name__)


@dataclass(frozen=True)
class Demo:
    """One thing that is played again and again: a prompt, or a held-out clip whose middle is generated anew."""

    name: str
    prompt: str
    duration: float
    seed: int
    item: FixedItem | None = None


def demos_of(settings: DemoSettings, heldout: Sequence[FixedItem]) -> list[Demo]:
    """The demos of a run: its prompts, captions of held-out clips, and one clip to inpaint."""
    found = [
        Demo(f"prompt{number}", prompt, settings.duration, settings.seed + number)
        for number, prompt in enumerate(settings.prompts)
    ]
    captions = list(dict.fromkeys(item.clip.prompts[0] for item in heldout))
    for number, caption in enumerate(captions[: settings.heldout_prompts]):
        found.append(Demo(f"heldout{number}", caption, settings.duration, settings.seed + 100 + number))
    if settings.inpaint and heldout:
        item = heldout[0]
        seconds = float(item.clip.seconds_S[0])
        found.append(Demo("inpaint", item.clip.prompts[0], min(seconds, settings.duration), settings.seed + 200, item))
    return found


def on_this_machine(name: str) -> bool:
    """Whether the model called `name` can be loaded without a download."""
    import huggingface_hub

    entry = hub.find(name)
    if entry is None or entry.repo_id is None:
        return entry is not None
    return isinstance(huggingface_hub.try_to_load_from_cache(entry.repo_id, WEIGHTS_FILE), str)


def players(model: StableAudio3, source: str, sibling: bool) -> list[str]:
    """Names or folders of the models to play on: the trained one, and its twin when wanted and at hand."""
    twin = model.sibling
    if sibling and twin is not None and not on_this_machine(twin):
        _logger.info("demos are played on %s alone: its twin %s is not on this machine", model.name, twin)
    return [source, *([twin] if sibling and twin is not None and on_this_machine(twin) else [])]


class Demos(lightning.Callback):
    """Plays the demos at step 0 (base alone) and every `settings.every` steps (adapter at each strength), on rank 0."""

    def __init__(
        self,
        run_dir: Path,
        tracker: Tracker,
        settings: DemoSettings,
        heldout: Sequence[FixedItem],
        models: Sequence[str],
        device: torch.device | str = "cpu",
    ) -> None:
        self.run_dir, self.tracker, self.settings = run_dir, tracker, settings
        self.demos = demos_of(settings, heldout)
        self.models, self.device = list(models), device

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The base model, once."""
        if trainer.global_step == 0 and trainer.is_global_zero:
            self._play_or_say(None, 0)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """The adapter as it is now."""
        assert isinstance(pl_module, LoraModule)
        step = trainer.global_step
        due = step % self.settings.every == 0 or step == trainer.max_steps
        if not trainer.fit_loop._should_accumulate() and due and trainer.is_global_zero:
            self._play_or_say(pl_module.export({}), step)

    def _play_or_say(self, adapter: Adapter | None, step: int) -> None:
        """Demos are not worth a run: what cannot be played, or has no room beside the training, is said aloud."""
        try:
            self.play(adapter, step)
        except MemoryShortageError:
            _logger.warning(
                "no demos at step %d: no room beside the training. Set callbacks.demos.duration below %g, or "
                "callbacks.demos.enabled=false.", step, self.settings.duration,
            )  # fmt: skip
        except SA3Error as error:
            _logger.warning("no demos at step %d: %s", step, error)

    def play(self, adapter: Adapter | None, step: int) -> list[Played]:
        """Play every demo with `adapter` at each strength, or the base alone, and record it."""
        if not self.demos:
            return []
        folder = self.run_dir / FOLDER / f"step-{step:08d}"
        played: list[Played] = []
        with torch.random.fork_rng():
            for number, source in enumerate(self.models):
                # The same precision every time, whatever this machine is quick at: demos are compared over steps.
                precision = "bf16" if torch.device(self.device).type == "cuda" else "fp32"
                generator = Generator.from_pretrained(source, device=self.device, precision=precision)
                with quiet("sa3train.adapters", "sa3train.inference"):
                    played += self._play_on(generator, adapter, step, folder, trained=number == 0)
                del generator
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        write_json(folder / INDEX, [asdict(entry) for entry in played])
        self._curves(played, step)
        return played

    def _play_on(
        self, generator: Generator, adapter: Adapter | None, step: int, folder: Path, *, trained: bool
    ) -> Iterator[Played]:
        if adapter is not None:
            generator.load_adapter(adapter, strength=self.settings.strengths[0])
        for demo in self.demos:
            for strength in self.settings.strengths if adapter is not None else [0.0]:
                if adapter is not None:
                    generator.set_strength(strength)
                audio_CN = self._generate(generator, demo, trained)
                yield self._record(generator, demo, audio_CN, strength, step, folder)

    def _generate(self, generator: Generator, demo: Demo, trained: bool) -> Tensor:
        duration = min(demo.duration, generator.facts.longest)
        settings: dict[str, Any] = {"prompt": demo.prompt, "seed": demo.seed}
        if trained:  # its twin is sampled otherwise, in its own steps
            settings |= {"steps": self.settings.steps, "cfg_scale": self.settings.cfg_scale}
        if demo.item is not None:
            z_1CT = demo.item.clip.data_SCF.to(generator.device, generator.model.dit.dtype)
            with torch.no_grad():
                source_CN = generator.model.autoencoder.decode(z_1CT)[0].float().cpu()
            rate = generator.facts.sample_rate
            duration = min(duration, source_CN.shape[1] / rate)
            settings |= {
                "inpaint_audio": (source_CN[:, : int(duration * rate)].clamp(-1, 1), rate),
                "inpaint_mask_start_seconds": duration / 3,
                "inpaint_mask_end_seconds": 2 * duration / 3,
            }
        return generator.generate(duration=duration, **settings).audio[0]

    def _record(
        self, generator: Generator, demo: Demo, audio_CN: Tensor, strength: float, step: int, folder: Path
    ) -> Played:
        from sa3train.audio.io import encode_audio

        rate, model = generator.facts.sample_rate, generator.model.name
        stem = f"{model}-{demo.name}-{strength:g}"
        write_bytes(folder / f"{stem}.wav", encode_audio(audio_CN, rate))
        title = f"{model}, strength {strength:g}, step {step}"
        picture = mel_picture(audio_CN, rate, title)
        write_bytes(folder / f"{stem}.png", picture)
        name = f"demos/{model}/{demo.name}/{strength:g}"
        self.tracker.audio(name, audio_CN, rate, step, demo.prompt)
        self.tracker.image(f"{name}/mel", picture, step, demo.prompt)
        measures = {key: value if math.isfinite(value) else None for key, value in measure(audio_CN, rate).items()}
        mode = "text" if demo.item is None else "inpaint"
        return Played(
            f"{stem}.wav", f"{stem}.png", demo.name, mode, demo.prompt, model, strength, demo.seed, step, measures
        )

    def _curves(self, played: Sequence[Played], step: int) -> None:
        """Means over demos of each measure, by model and strength."""
        sums: dict[str, list[float]] = {}
        for entry in played:
            for key, value in entry.measures.items():
                if value is not None:
                    sums.setdefault(f"demos/{entry.model}/{entry.strength:g}/{key}", []).append(value)
        if sums:
            self.tracker.metrics({name: sum(values) / len(values) for name, values in sums.items()}, step)


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Within the context these loggers say only what is wrong."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
