"""What the form asks for, as plain values: checked, turned into arguments of the generator, and read back from a
sidecar.

An adapter as the form asks for it.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sa3train.audio.io import audio_info
from sa3train.core.errors import RequestError
from sa3train.inference.request import number
from sa3train.studio.server.workspace import StudioError, Workspace, get_sibling, resolve_model_name


@dataclass(frozen=True)
class AdapterWish:
    """An adapter and how it is to play; `conditioner_strength` None: as `strength`."""

    path: str
    strength: float = 1.0
    conditioner_strength: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    exclude_layers: str = ""
    allow_partial: bool = False

    def arguments(self, workspace: Workspace) -> dict[str, Any]:
        """Keyword arguments of `Generator.load_adapter`."""
        path = workspace.inside(self.path)
        if not path.exists():
            raise StudioError(f"there is no adapter {path}.")
        return {
            "adapter": str(path),
            "strength": self.strength,
            "conditioner_strength": self.conditioner_strength,
            "interval": self.interval,
            "exclude_layers": self.exclude_layers,
            "allow_partial": self.allow_partial,
        }

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "AdapterWish":
        """From a row of the page's rack. Raises `RequestError` for what is no number."""
        path = str(row.get("path") or "")
        if not path.strip():
            raise StudioError("an adapter has no file: choose one, or remove it.")
        level = row.get("conditioner")
        return cls(
            path,
            read_number(f"the strength of {path}", row.get("strength"), 1.0),
            None if level in (None, "") else read_number(f"the conditioner strength of {path}", level, 1.0),
            (
                read_number(f"the interval of {path}", row.get("low"), 0.0),
                read_number(f"the interval of {path}", row.get("high"), 1.0),
            ),
            str(row.get("exclude") or ""),
            bool(row.get("partial")),
        )

    @classmethod
    def of_record(cls, entry: Mapping[str, Any]) -> "AdapterWish":
        """From an adapter of a sidecar."""
        return cls(
            entry["path"] or "",
            entry["strength"],
            entry["conditioner_strength"],
            (entry["interval"][0], entry["interval"][1]),
            ", ".join(entry["exclude_layers"]),
            entry["allow_partial"],
        )

    def row(self) -> dict[str, Any]:
        """As a row of the rack."""
        return {
            "path": self.path,
            "strength": self.strength,
            "conditioner": self.conditioner_strength,
            "low": self.interval[0],
            "high": self.interval[1],
            "exclude": self.exclude_layers,
            "partial": self.allow_partial,
        }


def read_number(what: str, value: Any, default: float | None) -> float:
    """`value`, a number or its text; empty is `default`, if there is one. Raises `RequestError` naming `what` it is."""
    if value in (None, "") and default is not None:
        return default
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError as error:
            raise RequestError(f"{what} must be a number, not {value!r}.") from error
    return number(what, value)


def name_of(path: str | Path) -> str:
    """A short name for an adapter: its file's, or its run's where every run calls it the same."""
    file = Path(path)
    return file.parent.name if file.stem == "adapter" and file.parent.name else file.stem


Mode = Literal["text", "restyle", "inpaint", "continue"]
MODES: dict[str, Mode] = {
    "Text to audio": "text",
    "Audio to audio": "restyle",
    "Inpaint": "inpaint",
    "Continue": "continue",
}
DEFAULT_LEVEL = 0.9
OWN_OF_A_MODEL = {
    "steps": None,
    "cfg_scale": None,
    "sampler_type": None,
    "negative_prompt": None,
    "cfg_interval": (0.0, 1.0),
    "cfg_norm_threshold": 0.0,
    "apg_scale": 1.0,
    "scale_phi": 0.0,
}
"""Settings that a base model and its post-trained twin do not share; None and these values mean the model's own."""


@dataclass(frozen=True)
class Wish:
    """A generation as the form says it. Times in seconds; None leaves a setting to the model."""

    model: str
    prompt: str
    mode: Mode = "text"
    negative_prompt: str | None = None
    duration: float = 10.0
    seed: int = -1
    batch_size: int = 1
    steps: int | None = None
    cfg_scale: float | None = None
    sampler_type: str | None = None
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    cfg_norm_threshold: float = 0.0
    scale_phi: float = 0.0
    apg_scale: float = 1.0
    source: str | None = None
    init_noise_level: float = DEFAULT_LEVEL
    regions: tuple[tuple[float, float], ...] = ()
    keep_exact: bool = False
    chunked_decode: bool | None = None
    precision: str = "auto"
    adapters: tuple[AdapterWish, ...] = ()

    def checked(self, workspace: Workspace) -> "Wish":
        """The same with full paths, its seed drawn, and the region of a continuation worked out.

        Raises `StudioError` for files that may not or cannot be used.
        """
        if not self.prompt.strip():
            raise StudioError("write a prompt: what is to be heard.")
        source = None
        if self.mode != "text":
            if not (self.source or "").strip():
                raise StudioError("this mode starts from audio: choose a file, or upload one.")
            source = str(workspace.file(self.source or "", "audio file"))
        adapters = tuple(replace(each, path=each.arguments(workspace)["adapter"]) for each in self.adapters)
        return replace(
            self,
            model=resolve_model_name(workspace, self.model),
            source=source,
            regions=self._regions(source),
            seed=secrets.randbelow(2**32) if self.seed == -1 else self.seed,
            adapters=adapters,
        )

    def _regions(self, source: str | None) -> tuple[tuple[float, float], ...]:
        if source is None or self.mode == "restyle":
            return ()
        if self.mode == "inpaint":
            if not self.regions:
                raise StudioError("say what to generate anew: mark a region on the waveform, or add one to its table.")
            return self.regions
        seconds = audio_info(source).seconds
        if self.duration <= seconds:
            raise StudioError(f"the audio is {seconds:.2f} s long: to continue it, ask for a longer duration.")
        return ((seconds, self.duration),)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `Generator.generate`."""
        found: dict[str, Any] = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt or None,
            "duration": self.duration,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "steps": self.steps,
            "cfg_scale": self.cfg_scale,
            "sampler_type": self.sampler_type,
            "cfg_interval": self.cfg_interval,
            "cfg_norm_threshold": self.cfg_norm_threshold,
            "scale_phi": self.scale_phi,
            "apg_scale": self.apg_scale,
            "chunked_decode": self.chunked_decode,
        }
        if self.mode == "restyle":
            found |= {"init_audio": self.source, "init_noise_level": self.init_noise_level}
        elif self.mode != "text":
            found |= {
                "inpaint_audio": self.source,
                "inpaint_mask_start_seconds": [start for start, _ in self.regions],
                "inpaint_mask_end_seconds": [end for _, end in self.regions],
                "keep_exact": self.keep_exact,
            }
        return found

    def at(self, factor: float) -> "Wish":
        """With every adapter at `factor` times its strength; without adapters at 0."""
        if factor == 0:
            return replace(self, adapters=())
        scaled = [
            replace(
                each,
                strength=each.strength * factor,
                conditioner_strength=None if each.conditioner_strength is None else each.conditioner_strength * factor,
            )
            for each in self.adapters
        ]
        return replace(self, adapters=tuple(scaled))

    def on_sibling(self) -> "Wish":
        """On the base of a post-trained model or the other way round, with that model's own sampling settings."""
        return replace(self, model=get_sibling(self.model), **OWN_OF_A_MODEL)  # type: ignore[arg-type]

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "Wish":
        """What a sidecar recorded, to be asked for again."""
        settings, inputs = record["settings"], record["inputs"]
        item = record["item"]
        starts = settings["inpaint_mask_start_seconds"] or []
        regions = tuple(zip(starts, settings["inpaint_mask_end_seconds"] or [], strict=True))
        source = inputs["inpaint_audio"] or inputs["init_audio"]
        mode: Mode = "inpaint" if inputs["inpaint_audio"] else "restyle" if inputs["init_audio"] else "text"
        negative = settings["negative_prompt"]
        return cls(
            model=record["model"]["source"],
            prompt=settings["prompt"][item],
            mode=record.get("studio", {}).get("mode", mode),
            negative_prompt=None if negative is None else negative[item],
            duration=settings["duration"][item],
            seed=settings["seed"] if settings["seed"] is not None else -1,
            batch_size=settings["batch_size"],
            steps=settings["steps"],
            cfg_scale=settings["cfg_scale"],
            sampler_type=settings["sampler_type"],
            cfg_interval=tuple(settings["cfg_interval"]),
            cfg_norm_threshold=settings["cfg_norm_threshold"],
            scale_phi=settings["scale_phi"],
            apg_scale=settings["apg_scale"],
            source=None if source is None else source["path"],
            init_noise_level=settings["init_noise_level"]
            if settings["init_noise_level"] is not None
            else DEFAULT_LEVEL,
            regions=regions,
            keep_exact=settings["keep_exact"],
            chunked_decode=settings["chunked_decode"],
            precision=record["precision"],
            adapters=tuple(AdapterWish.of_record(entry) for entry in record["adapters"]),
        )

    @classmethod
    def from_result(cls, record: Mapping[str, Any], audio: Path, mode: Mode) -> "Wish":
        """The model and adapters of a result, with its own sound `audio` as the source: its middle third is marked for
        inpainting, half its length is added to continue it."""
        same, seconds = cls.of_record(record), float(record["seconds"])
        middle = ((round(seconds / 3, 2), round(seconds * 2 / 3, 2)),)
        return cls(
            model=same.model,
            prompt=same.prompt,
            mode=mode,
            duration=round(seconds * 1.5 if mode == "continue" else seconds, 2),
            source=str(audio),
            regions=middle if mode == "inpaint" else (),
            precision=same.precision,
            adapters=same.adapters,
        )


def factors(text: str) -> list[float]:
    """Strengths written with commas, such as "0, 0.5, 1": each once, rising. Raises `StudioError`."""
    try:
        found = sorted({float(part) for part in text.replace(";", ",").split(",") if part.strip()})
    except ValueError as error:
        raise StudioError(
            f"{text!r} is not a list of strengths: write numbers with commas, such as 0, 0.5, 1."
        ) from error
    if not 1 <= len(found) <= 8 or any(abs(value) > 100 for value in found):
        raise StudioError("compare between one and eight strengths, each within ±100.")
    return found


def regions_of(rows: Sequence[Sequence[Any]]) -> tuple[tuple[float, float], ...]:
    """Regions of the page's table. Raises `RequestError` for what is no number."""
    return tuple(
        (read_number("the start of a region", start, None), read_number("the end of a region", end, None))
        for start, end in rows
    )
