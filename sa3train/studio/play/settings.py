"""What the Play page asks for: a model, adapters and `GenerationSettings`, read from the form or from a sidecar."""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sa3train.audio.io import read_audio_info
from sa3train.core.errors import SA3Error
from sa3train.inference.settings import GUIDANCE_SETTINGS, GenerationSettings, check_number
from sa3train.inference.sidecar import list_places
from sa3train.studio.server import folders
from sa3train.studio.server.widgets import parse_numbers, parse_optional_number
from sa3train.studio.server.workspace import StudioError, Workspace

Mode = Literal["text", "restyle", "inpaint", "continue"]
MODES: dict[str, Mode] = {
    "Text to audio": "text",
    "Audio to audio": "restyle",
    "Inpaint": "inpaint",
    "Continue": "continue",
}
MODEL_SPECIFIC = ("steps", "cfg_scale", "sampler_type", *GUIDANCE_SETTINGS)
"""Settings that a base model and its post-trained sibling do not share; at their defaults they are the model's own."""
MOST_STRENGTHS = 8
STRENGTHS_LABEL, SIBLING_LABEL = "Strength multipliers", "Base and post-trained model side by side"
"""Labels of the fields of a comparison."""
SHORTEST_SECONDS = 0.01
"""Shortest continuation."""


@dataclass(frozen=True)
class AdapterSettings:
    """An adapter and how to load it.

    Attributes:
        path: File or folder.
        strength: 0 is the bare model, 1 the adapter as trained.
        conditioner_strength: Strength in the conditioner; None for the same.
        interval: Noise levels at which it acts.
        exclude_layers: Comma-separated substrings of layers to leave untouched.
        allow_partial: Whether to load it when only some layers match.
        end_strength: Strength in the last window of a piece; None for the same.
    """

    path: str
    strength: float = 1.0
    conditioner_strength: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    exclude_layers: str = ""
    allow_partial: bool = False
    end_strength: float | None = None

    @property
    def strengths(self) -> float | tuple[float, float]:
        """The strength as `Generator.load_adapter` takes it."""
        return self.strength if self.end_strength is None else (self.strength, self.end_strength)

    @classmethod
    def from_row(cls, row: Mapping[str, Any], number: int = 1) -> "AdapterSettings":
        """Read a row of the adapter list.

        Args:
            row: Values by field, as `assets/rack.js` has them.
            number: Number of the row, for messages.

        Returns:
            The adapter.

        Raises:
            StudioError: When no file is chosen, or the noise levels are not in order.
        """
        path, name = str(row.get("path") or ""), f"Adapter {number}"
        if not path.strip():
            raise StudioError(f"{name} has no file. Choose one from the list, upload one, or press Remove.")
        if row.get("strength", 1.0) in ("", None):
            raise StudioError(f"{name}: Strength is empty. Enter a number, such as 1.")
        low = parse_number(f"{name}: Min noise level", row.get("low"), 0.0)
        high = parse_number(f"{name}: Max noise level", row.get("high"), 1.0)
        if not 0 <= low <= high <= 1:
            raise StudioError(
                f"{name}: Min noise level {low:g} and Max noise level {high:g} must be between 0 and 1, in this order."
            )
        return cls(
            path,
            parse_number(f"{name}: Strength", row.get("strength", 1.0)),
            parse_optional_number(f"{name}: Conditioner strength", row.get("conditioner_strength")),
            (low, high),
            str(row.get("exclude_layers") or ""),
            bool(row.get("allow_partial")),
            parse_optional_number(f"{name}: Strength in the last window", row.get("end_strength")),
        )

    @classmethod
    def from_record(cls, entry: Mapping[str, Any], path: str) -> "AdapterSettings":
        """Read an adapter of a sidecar.

        Args:
            entry: Entry of the sidecar's `adapters`.
            path: Where its file is now.

        Returns:
            The adapter.
        """
        known = {name: entry[name] for name in ("strength", "conditioner_strength", "allow_partial")}
        if isinstance(entry["strength"], list):
            known["strength"], known["end_strength"] = entry["strength"]
        layers = ", ".join(entry["exclude_layers"])
        return cls(path, interval=tuple(entry["interval"]), exclude_layers=layers, **known)

    def to_row(self) -> dict[str, Any]:
        """Return a row of the adapter list.

        Returns:
            Values by field, as `assets/rack.js` has them.
        """
        row = asdict(self)
        low, high = row.pop("interval")
        return row | {"low": low, "high": high}

    def scale(self, factor: float) -> "AdapterSettings":
        """Return a copy with its strengths multiplied.

        Args:
            factor: The multiplier.

        Returns:
            The adapter.
        """
        given = {name: getattr(self, name) for name in ("strength", "conditioner_strength", "end_strength")}
        return replace(self, **{name: value * factor for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class PlaySettings:
    """A generation of the Play page.

    Attributes:
        model: Name or folder.
        settings: What to generate, the audio of its mode included.
        mode: What the audio is used for.
        precision: What to load the model in.
        adapters: Adapters in order.
    """

    model: str
    settings: GenerationSettings
    mode: Mode = "text"
    precision: str = "auto"
    adapters: tuple[AdapterSettings, ...] = ()

    @property
    def source(self) -> str | None:
        """The source audio, where the mode has any."""
        return self.settings.init_audio or self.settings.inpaint_audio

    def resolve(self, workspace: Workspace) -> "PlaySettings":
        """Return a copy with full paths, the seed drawn, and the region of a continuation computed.

        Args:
            workspace: The studio's folders.

        Returns:
            The settings.

        Raises:
            StudioError: When the prompt, the source audio or a region is missing, or a file may not be used.
        """
        settings = self.settings
        if not str(settings.prompt).strip():
            raise StudioError("Prompt is empty. Enter one.")
        changes: dict[str, Any] = {"seed": secrets.randbelow(2**32) if settings.seed == -1 else settings.seed}
        if self.mode != "text":
            if not (self.source or "").strip():
                raise StudioError("Source audio is missing, which this mode needs. Choose a file or upload one.")
            source = str(workspace.resolve_file(self.source or "", "audio file"))
            changes |= {"init_audio" if self.mode == "restyle" else "inpaint_audio": source}
        if self.mode == "inpaint" and not settings.inpaint_mask_start_seconds:
            raise StudioError("There is no region to regenerate. Mark one on the waveform, or add one to the table.")
        if self.mode == "continue" and settings.bars is not None:
            raise StudioError("Bars count from the start. To continue audio, set the duration instead.")
        if self.mode == "continue":
            seconds, duration = read_audio_info(source).seconds, check_number("duration", settings.duration)
            if duration - seconds < SHORTEST_SECONDS:
                raise StudioError(f"The audio is {seconds:.2f} s long. To continue it, increase the duration.")
            changes |= {"inpaint_mask_start_seconds": seconds, "inpaint_mask_end_seconds": duration}
        return replace(
            self,
            model=folders.resolve_model_name(workspace, self.model),
            settings=replace(settings, **changes),
            adapters=self.resolve_adapters(workspace),
        )

    def resolve_adapters(self, workspace: Workspace) -> tuple[AdapterSettings, ...]:
        """Return copies of the adapters with full paths.

        Args:
            workspace: The studio's folders.

        Returns:
            The adapters.

        Raises:
            StudioError: When a path does not exist or may not be used.
        """
        found = []
        for number, adapter in enumerate(self.adapters, 1):
            try:
                found.append(replace(adapter, path=str(folders.resolve_adapter(workspace, adapter.path))))
            except SA3Error as error:
                raise StudioError(f"Adapter {number}: {error}") from error
        return tuple(found)

    def scale_adapters(self, factor: float) -> "PlaySettings":
        """Return a copy with the strength of every adapter multiplied, without adapters for 0.

        Args:
            factor: The multiplier.

        Returns:
            The settings.
        """
        return replace(self, adapters=tuple(adapter.scale(factor) for adapter in self.adapters) if factor else ())

    def switch_to_sibling(self) -> "PlaySettings":
        """Return a copy for the base of a post-trained model, or the other way round, with its own sampling settings.

        Returns:
            The settings.
        """
        defaults = {name: getattr(GenerationSettings, name) for name in MODEL_SPECIFIC}
        return replace(self, model=folders.get_sibling(self.model), settings=replace(self.settings, **defaults))

    @classmethod
    def from_record(cls, record: Mapping[str, Any], folder: Path) -> "PlaySettings":
        """Read the settings of a result.

        Args:
            record: Content of its sidecar.
            folder: The sidecar's folder.

        Returns:
            Settings that generate it again.
        """

        def locate(path: str | None) -> str:
            places = list_places(path, record, folder) if path else []
            return str(places[0].resolve()) if places else path or ""

        inputs = {role: locate(entry["path"]) for role, entry in record["inputs"].items() if entry}
        settings, item = GenerationSettings.from_dict(record["settings"], **inputs), record["item"]
        negative = settings.negative_prompt
        mode = "inpaint" if settings.inpaint_audio else "restyle" if settings.init_audio else "text"
        return cls(
            model=record["model"]["source"],
            settings=replace(
                settings,
                prompt=settings.prompt[item],
                duration=record["settings"]["duration"][item],
                negative_prompt=negative[item] if negative else None,
            ),
            mode=(record.get("studio") or {}).get("mode", mode),
            precision=record["precision"],
            adapters=tuple(AdapterSettings.from_record(entry, locate(entry["path"])) for entry in record["adapters"]),
        )

    @classmethod
    def from_result(cls, record: Mapping[str, Any], audio: Path, mode: Mode) -> "PlaySettings":
        """Make settings that use a result as source audio, with its model and adapters.

        Args:
            record: Content of the result's sidecar.
            audio: Its audio file.
            mode: What to use it for. Inpainting marks its middle third, continuing adds half its length.

        Returns:
            The settings.
        """
        same, seconds = cls.from_record(record, audio.parent), float(record["seconds"])
        regions = ((round(seconds / 3, 2), round(seconds * 2 / 3, 2)),) if mode == "inpaint" else ()
        settings = GenerationSettings(
            same.settings.prompt,
            duration=round_seconds(seconds * 1.5 if mode == "continue" else seconds),
            **select_source(mode, str(audio), regions),
        )
        return replace(same, mode=mode, settings=settings)


def select_source(mode: Mode, source: str | None, regions: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Select the settings that use source audio in a mode.

    Args:
        mode: The mode.
        source: The audio file.
        regions: (start, end) in seconds of what to regenerate.

    Returns:
        Values of `GenerationSettings`.
    """
    if mode == "text":
        return {}
    if mode == "restyle":
        return {"init_audio": source}
    if mode == "continue" or not regions:
        return {"inpaint_audio": source}
    starts, ends = zip(*regions, strict=True)
    return {"inpaint_audio": source, "inpaint_mask_start_seconds": starts, "inpaint_mask_end_seconds": ends}


def parse_number(name: str, value: Any, default: float | None = None) -> float:
    """Parse a number of the page.

    Args:
        name: What it is, for the message.
        value: A number or its text.
        default: The number that an empty value means; None for none.

    Returns:
        The number. What is not a number is refused with a `GenerationError`.
    """
    number = parse_optional_number(name, value)
    return check_number(name, default if number is None else number)


def round_seconds(seconds: float) -> float:
    """Round a length to few digits, up, so that it has no sample less.

    Args:
        seconds: The length.

    Returns:
        The next whole microsecond.
    """
    return math.ceil(round(seconds * 1e6, 3)) / 1e6


def parse_strengths(text: str) -> list[float]:
    """Parse comma-separated strength multipliers.

    Args:
        text: Such as "0, 0.5, 1".

    Returns:
        The numbers, each once, in rising order.

    Raises:
        StudioError: When they are none, too many or too large.
    """
    found = sorted(set(parse_numbers(text)))
    if not 1 <= len(found) <= MOST_STRENGTHS or any(abs(value) > 100 for value in found):
        raise StudioError(f"{STRENGTHS_LABEL} must be 1 to {MOST_STRENGTHS} numbers within ±100, such as 0, 0.5, 1.")
    return found


def parse_regions(rows: Sequence[Sequence[Any]]) -> tuple[tuple[float, float], ...]:
    """Parse the table of regions.

    Args:
        rows: (start, end) in seconds of each.

    Returns:
        The regions.

    Raises:
        StudioError: A field is empty.
    """
    found = []
    for number, row in enumerate(rows, 1):
        names = [f"{end} of region {number}" for end in ("Start", "End")]
        for name, value in zip(names, row, strict=True):
            if value in (None, ""):
                raise StudioError(f"{name} is empty. Enter its seconds, or remove the region.")
        start, end = map(parse_number, names, row)
        found.append((start, end))
    return tuple(found)


def shorten_name(path: str | Path) -> str:
    """Shorten the path of an adapter.

    Args:
        path: The path.

    Returns:
        The file's or folder's name, or its folder's where the file is called `adapter`, as every run calls it.
    """
    file = Path(folders.name_adapter(str(path)))
    name = file.stem if file.suffix in folders.ADAPTER_SUFFIXES else file.name  # RUN.2@300 has no suffix
    return file.parent.name if name == "adapter" and file.parent.name else name
