"""Sidecars that were edited: each field × each kind of wrong value is refused by name, or plays."""

import copy
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.audio import tone, write_clip
from helpers.golden import GOLDEN
from sa3train.cli.generate import main
from sa3train.core.errors import GenerationError
from sa3train.inference import Generator
from sa3train.inference.input_audio import load_input_audio
from sa3train.inference.outputs import GenerationOutput
from sa3train.inference.resolve import resolve_settings
from sa3train.inference.settings import AUDIO_SETTINGS, GenerationSettings
from sa3train.inference.sidecar import read_sidecar

MODEL, LORA = GOLDEN / "plain", GOLDEN / "plain" / "adapters" / "lora.safetensors"
MISSING = object()
VALUES: dict[str, Any] = {
    **{"missing": MISSING, "null": None, "text": "banana", "number": 3, "negative": -7, "huge": 10**30, "true": True},
    **{"nan": float("nan"), "inf": float("inf"), "huge float": 1e300, "huge integer": 10**400, "list": [1]},
    **{"empty": "", "long": "x" * 300, "nul": "a\0b", "path": "../../a.wav", "dict": {"a": 1}, "surrogate": "\udcff"},
}
WORDS = {
    "subtype": "WAV does not support",
    "seed": "own generator",
    "inpaint_mask_start_seconds": "inpainting region|--inpaint-start",
    "inpaint_mask_end_seconds": "inpainting region|--inpaint-end",
    "inpaint_audio": "--inpaint-audio",
    "path": "input audio|init_audio|inpaint_audio|adapter",
    "conditioner_strength": "--conditioner-strength",
    "exclude_layers": "layer pattern",
    "sha256": "SHA-256",
    "source": "model",
    "fingerprint": "model",
}
"""What messages about some fields say for their names, such as the flags that set them."""
Keys = tuple[str | int, ...]


@cache
def load_model() -> Generator:
    return Generator.from_pretrained(MODEL, "cpu", "fp32")


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model that is loaded once, and generates after every check in no time."""
    monkeypatch.chdir(tmp_path)
    generator, original = load_model(), Generator.from_pretrained

    def load(name: str, device: Any, precision: str, **options: Any) -> Generator:
        if name != str(MODEL) or options.get("cuda_graphs"):
            return original(name, device, precision, **options)
        generator.stack.clear()
        generator._files.clear()
        return generator

    def generate(self: Generator, settings: GenerationSettings, **_: Any) -> GenerationOutput:
        resolved = resolve_settings(settings, self.facts)
        given = {role: getattr(resolved, role) for role in AUDIO_SETTINGS}
        inputs = {role: load_input_audio(value, 44100, role).to_dict() for role, value in given.items() if value}
        record = {
            "model": {
                "name": self.model.name,
                "source": str(MODEL),
                "fingerprint": self.model.fingerprint(),
                "autoencoder": self.model.autoencoder.fingerprint(),
            },
            "precision": "fp32",
            "settings": resolved.to_dict(),
            "inputs": {role: inputs.get(role) for role in AUDIO_SETTINGS},
            "adapters": self.adapters,
            "environment": {"torch": "1.0", "threads": 1},
        }
        audio = [torch.zeros(2, round(44100 * seconds)) for seconds in resolved.duration]
        return GenerationOutput(audio, 44100, [resolved.seed] * len(audio), None, [0.0] * len(audio), [], record)

    monkeypatch.setattr(Generator, "from_pretrained", load)
    monkeypatch.setattr(Generator, "generate_from", generate)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_record() -> dict[str, Any]:
    """A sidecar in which every part has content."""
    write_clip("source.wav", tone(0.3))
    generator = Generator.from_pretrained(str(MODEL), "cpu", "fp32")
    generator.load_adapter(LORA, 0.5, interval=(0.2, 1.0), conditioner_strength=0.1, exclude_layers="layers[1-1]")
    settings = GenerationSettings(
        ["hum", "bells"], ["harsh", None], 0.5, seed=3, steps=2, init_audio="source.wav", inpaint_audio="source.wav",
        inpaint_mask_start_seconds=0.1, inpaint_mask_end_seconds=0.3,
    )  # fmt: skip
    generator.generate_from(settings).save("a.wav", item=1)
    Path("a.wav").unlink()
    return dict(json.loads(Path("a.wav.json").read_text()))


def list_fields(value: Any, keys: Keys = ()) -> Iterator[Keys]:
    """Every field of a record at any depth, and the first item of each list."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, item in items:
        yield (*keys, key)
        yield from list_fields(item, (*keys, key))


def edit(record: dict[str, Any], keys: Keys, value: Any) -> dict[str, Any]:
    edited = copy.deepcopy(record)
    parent = edited
    for key in keys[:-1]:
        parent = parent[key]  # type: ignore[index]
    if value is MISSING:
        del parent[keys[-1]]  # type: ignore[arg-type]
    else:
        parent[keys[-1]] = value  # type: ignore[index]
    return edited


def play(record: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """Generate from an edited sidecar; the error, or nothing where it plays."""
    Path("a.wav.json").write_text(json.dumps(record))
    try:
        read_sidecar(Path("a.wav.json"))  # most are refused here, sooner than by the command
    except GenerationError as error:
        return str(error)
    for made in Path().glob("a*.wav"):
        made.unlink()
    capsys.readouterr()
    code = main(["--from", "a.wav.json", "--device", "cpu"])
    said = capsys.readouterr()
    assert ".wav: " in said.out or code == 1
    return said.err.rpartition("error: ")[2] if code else ""


@pytest.mark.slow
def test_every_edit_of_every_field_is_refused_by_name_or_plays(capsys: pytest.CaptureFixture[str]) -> None:
    record = make_record()
    assert play(record, capsys) == ""
    fields = list(list_fields(record))
    assert len(fields) > 50
    problems = []
    for keys in fields:
        name = next(str(key) for key in reversed(keys) if isinstance(key, str))
        for kind, value in VALUES.items():
            error = play(edit(record, keys, value), capsys)
            if error and not ("a.wav.json" in error and re.search(f"{name}|{WORDS.get(name, name)}", error)):
                problems.append(f"{'.'.join(map(str, keys))} {kind}: {error.strip()[:200]}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(("field", "value"), [("seed", 4), ("seconds", 9.0)])
def test_a_field_that_only_repeats_a_setting_is_not_changed_in_vain(
    field: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{field}={value:g}" in play(make_record() | {field: value}, capsys)


def test_the_audio_stands_for_its_sidecar() -> None:
    make_record()
    assert read_sidecar(Path("a.wav")) == read_sidecar(Path("a.wav.json"))


def test_what_editors_leave_is_read_or_refused() -> None:
    make_record()
    text = Path("a.wav.json").read_text()
    Path("a.wav.json").write_text(text, encoding="utf-8-sig")
    assert read_sidecar(Path("a.wav.json")) == json.loads(text)
    Path("a.wav.json").write_text(text.replace('"steps":', '"steps": 9, "steps":'))
    with pytest.raises(GenerationError, match="'steps' twice"):
        read_sidecar(Path("a.wav.json"))


@pytest.mark.parametrize("unknown", ["extra", "seeds", "Model"])
def test_unknown_fields_are_refused(unknown: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = make_record()
    for edited in (record | {unknown: 1}, edit(record, ("settings", unknown), 1), edit(record, ("model", unknown), 1)):
        assert unknown in play(edited, capsys)
