"""Model cards: the README.md of a run folder; a folder with an adapter, its card and samples for the hub."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import yaml

from sa3train.adapters.adapter import BASE_SAMPLE, PROMPTS, TRAINING_CONFIG, Adapter
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.adapters.formats.native import unify_scales
from sa3train.core.files import check_target, replace_folder, write_text
from sa3train.models.hub import CheckpointInfo, find_checkpoint
from sa3train.reports.curves import is_decoder_run
from sa3train.reports.html import format_duration
from sa3train.reports.loss_change import compute_loss_change
from sa3train.reports.run_files import ADAPTER_FILE, CARD_FILE, RunFiles, holds_run, read_run

SAMPLES_DIR = "samples"
DATA_SUMMARY, TRIGGER = "data_summary", "trigger"
"""Keys in an adapter's metadata."""

SHOWN_SAMPLES = 4
MARK = "<!-- written by sa3train -->"
"""By this line a folder is known as one of ours, which may be replaced."""

NAMES_ONLY = "Its captions are names or single words, so it knows no other prompts: `sa3-data caption` describes clips."
"""Said of an adapter whose prompts describe nothing."""

_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True)
class Sample:
    """An audio example of a card.

    Attributes:
        file: Its path below the card's folder.
        prompt: The prompt it was generated with.
        note: How it was generated.
    """

    file: str
    prompt: str
    note: str = ""


@dataclass(frozen=True)
class CardOptions:
    """What the author of an adapter says about it.

    Attributes:
        name: Its name.
        license: Its license, as an id of the hub ("cc-by-4.0") or in words; None where none is stated.
        strength: The strength to play it at.
        shows_prompts: Whether the card and the adapter's metadata have prompts of the training set.
    """

    name: str
    license: str | None = None
    strength: float = 1.0
    shows_prompts: bool = True


def render_card(
    adapter: Adapter, file: str, options: CardOptions, samples: Sequence[Sample] = (), run: RunFiles | None = None
) -> str:
    """Render the card of an adapter as Markdown, with the front matter that the Hugging Face hub reads.

    Args:
        adapter: The adapter.
        file: Its file name beside the card.
        options: What its author says about it.
        samples: Audio examples beside the card.
        run: The run it was trained in, if there is one.

    Returns:
        The text.
    """
    prompts = adapter.prompts if options.shows_prompts else []
    samples = [sample if options.shows_prompts else replace(sample, prompt="") for sample in samples]
    front = yaml.safe_dump(_build_front_matter(adapter, options, samples), sort_keys=False, allow_unicode=True)
    sections = {
        "": _describe(adapter, run),
        "Play": _describe_play(adapter, file, options, prompts),
        "Prompts to try": _format_code("text", prompts),
        "Listen": "\n\n".join(map(_format_sample, samples)),
        "Training data": _describe_data(adapter, run),
        "License": _describe_license(adapter, options.license),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections.items() if text)
    return f"---\n{front}---\n{MARK}\n\n# {options.name}\n\n{body}\n"


def write_run_card(run_dir: Path) -> None:
    """Write the README.md of a run folder: what its adapter is, what it was trained on, and how to play it.

    Args:
        run_dir: The run folder, with an adapter.
    """
    run, adapter = read_run(run_dir), load_adapter(run_dir / ADAPTER_FILE)
    options = CardOptions(run_dir.resolve().name)
    samples = list_demo_samples(run, shows_prompts=bool(adapter.prompts))
    write_text(run_dir / CARD_FILE, render_card(adapter, ADAPTER_FILE, options, samples, run))


def find_run(path: str | Path) -> RunFiles | None:
    """Find the run that an adapter was trained in.

    Args:
        path: The run folder, or a file in it.

    Returns:
        The run; None for an adapter that lies elsewhere.
    """
    folders = (folder for folder in (Path(path), Path(path).absolute().parent) if holds_run(folder))
    return next(map(read_run, folders), None)


def list_demo_samples(run: RunFiles, *, shows_prompts: bool) -> list[Sample]:
    """List the newest demos of a run that play the adapter at full strength, as far as their audio is still there.

    Args:
        run: The run.
        shows_prompts: Whether they have their prompts, which are captions of held-out clips.

    Returns:
        Some samples, with paths below the run folder.
    """
    generated = [demo for demo in run.demos if demo.mode == "text" and demo.strength == 1]
    demos = [demo for demo in generated if (run.path / demo.file).is_file()]
    newest = [demo for demo in demos if demo.step == demos[-1].step][:SHOWN_SAMPLES]
    return [
        Sample(demo.file, demo.prompt * shows_prompts, f"on {demo.model}, seed {demo.seed}, step {demo.step}")
        for demo in newest
    ]


def pack_card(
    target: str | Path,
    adapter: Adapter,
    options: CardOptions,
    samples: Sequence[tuple[Sample, bytes]] = (),
    run: RunFiles | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a folder for the hub, whole or not at all: README.md, the adapter, and its samples.

    The adapter's metadata is copied without paths of the machine, and so without the training configuration. Where the
    adapter carries no prompts, they are private, and the demos' are left out too.

    Args:
        target: The folder.
        adapter: The adapter.
        options: What its author says about it.
        samples: Audio examples; their `file` is the name they get below `samples/`.
        run: The run it was trained in; its demos are the samples where none are given.
        overwrite: Replace such a folder.

    Returns:
        The folder.
    """
    check_target(target, [adapter.source] if adapter.source else [], overwrite)
    if not samples and run is not None:
        demos = list_demo_samples(run, shows_prompts=bool(adapter.prompts))
        named = [replace(demo, file=f"{number}{Path(demo.file).suffix}") for number, demo in enumerate(demos, 1)]
        samples = [(new, (run.path / old.file).read_bytes()) for new, old in zip(named, demos, strict=True)]
    hidden = {TRAINING_CONFIG, BASE_SAMPLE, *([] if options.shows_prompts else [PROMPTS])}
    shared = {key: text for key, text in adapter.metadata.items() if key not in hidden}
    if _find_base(adapter) is None and "base_model" in shared:
        shared["base_model"] = Path(shared["base_model"]).name
    file = f"{options.name}.safetensors"
    shown = [replace(sample, file=f"{SAMPLES_DIR}/{sample.file}") for sample, _ in samples]
    with replace_folder(target, _is_ours) as staging:
        save_adapter(staging / file, unify_scales(replace(adapter, metadata=shared)), dtype=None)
        write_text(staging / CARD_FILE, render_card(adapter, file, options, shown, run))
        for sample, (_, content) in zip(shown, samples, strict=True):
            (staging / sample.file).parent.mkdir(exist_ok=True)
            (staging / sample.file).write_bytes(content)
    return Path(target)


def choose_example(prompts: Sequence[str]) -> str:
    """Choose the prompt that describes most, for an example.

    Args:
        prompts: The prompts.

    Returns:
        The first with four words or more, else that with most words; words are no parts of file names and no numbers.
        Empty without prompts.
    """
    return max(prompts, key=lambda prompt: min(_count_words(prompt), 4), default="")


def _count_words(text: str) -> int:
    return sum(bool(re.fullmatch(r"[^\W\d_]+(['’/&-][^\W\d_]+)*[.,;:!?]*", word)) for word in text.split())


def summarize_data(data: Mapping[str, Any]) -> str:
    """Summarize what a run trains on.

    Args:
        data: Content of `data.json`.

    Returns:
        Text such as "24 clips, 3.1 min; held out: 4 clips, 31 s"; empty if it is not known.
    """
    totals = []
    for split in ("train", "heldout"):
        found = [source["splits"].get(split, {}) for source in data.get("sources", [])]
        clips, seconds = (sum(each.get(key, 0) for each in found) for key in ("clips", "seconds"))
        totals.append(f"{clips} clip{'s' if clips != 1 else ''}, {format_duration(seconds)}" if clips else "")
    return "; held out: ".join(filter(None, totals))


def _is_ours(folder: Path) -> bool:
    card = folder / CARD_FILE
    return card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace")


def _build_front_matter(adapter: Adapter, options: CardOptions, samples: Sequence[Sample]) -> dict[str, Any]:
    base = _find_base(adapter)
    is_id = options.license is not None and _LICENSE_ID.fullmatch(options.license)
    front: dict[str, Any] = (
        {"base_model": base.repo_id, "base_model_relation": "adapter"} if base and base.repo_id else {}
    )
    if options.license is not None:
        front |= {"license": options.license} if is_id else {"license": "other", "license_name": options.license}
    tags = ("stable-audio-3", "text-to-audio", "lora", adapter.spec.adapter_type, "sa3train")
    front |= {"pipeline_tag": "text-to-audio", "tags": list(dict.fromkeys(tags))}
    if trigger := adapter.metadata.get(TRIGGER):
        front["instance_prompt"] = trigger
    if shown := [sample for sample in samples if sample.prompt]:
        front["widget"] = [{"text": sample.prompt, "output": {"url": sample.file}} for sample in shown]
    return front


def _describe(adapter: Adapter, run: RunFiles | None) -> str:
    spec, paths = adapter.spec, adapter.tensors
    base = _link_base(adapter)
    parameters = sum(tensor.numel() for params in paths.values() for tensor in params.values())
    part = " for the decoder of" if adapter.part == "decoder" else " for"
    lines = [f"A {spec.adapter_type} adapter{part} Stable Audio 3{f', trained on {base}' if base else ''}.", ""]
    size = f"{len(paths)} layers, {parameters / 1e6:.1f} M parameters"
    lines.append(f"- rank {spec.format_rank(paths)}, alpha {spec.format_alpha(paths)}, {size}")
    if (step := adapter.metadata.get("step", "")).isdigit():
        is_last = run is not None and run.record.get("steps") == int(step)
        lines.append(f"- {step} training steps{f' in {format_duration(run.seconds)}' if run and is_last else ''}")
    if run is not None and (change := compute_loss_change(run.validation, "val")):
        validated, levels = run.validation["history"][-1]["step"], run.validation["levels"]
        loss = f"log-mel distance after {len(levels)} round trips" if is_decoder_run(run) else "loss"
        at = "" if step in ("", str(validated)) else f", measured at step {validated}"
        change_text = change.describe("the base model's")
        lines.append(f"- {loss} on held-out clips {change_text}{at}")
    return "\n".join(lines)


def _describe_play(adapter: Adapter, file: str, options: CardOptions, prompts: Sequence[str]) -> str:
    base = _find_base(adapter)
    is_base = base is not None and base.name.endswith("-base")
    model = (base.sibling if is_base and base.sibling else base.name) if base else "medium"
    strength = "" if options.strength == 1 else f"={options.strength:g}"
    prompt = choose_example(prompts) or adapter.metadata.get(TRIGGER) or "a prompt"
    command = ["sa3-generate", "--model", model, "--lora", f"{file}{strength}", "-p", prompt, "-o", "out.wav"]
    trigger = adapter.metadata.get(TRIGGER)
    notes = [
        f"Begin prompts with `{_clean(trigger)}`." if trigger else "",
        # not all scripts have spaces between words
        NAMES_ONLY if prompts and prompt.isascii() and _count_words(prompt) < 2 else "",
        f"Strength {options.strength:g} is where to start; 0 is the model without it.",
        f"It was trained on `{base.name}` and plays on both models." if is_base and base else "",
        f"For {'sa3.cpp' if adapter.part == 'decoder' else 'ComfyUI, diffusers or sa3.cpp'}: `sa3-adapter convert`.",
    ]
    return f"{_format_code('bash', [shlex.join(command)])}\n\n{' '.join(filter(None, notes))}"


def _describe_data(adapter: Adapter, run: RunFiles | None) -> str:
    summary = adapter.metadata.get(DATA_SUMMARY) or (summarize_data(run.data) if run else "")
    manifest = adapter.metadata.get("data_manifest", "")
    return ". ".join(filter(None, [escape(summary), manifest and f"Manifest `{_clean(manifest)[:16]}`"]))


def _describe_license(adapter: Adapter, license: str | None) -> str:
    base = _find_base(adapter)
    own = f"This adapter: {license}." if license else "The author of this adapter has stated no license for it."
    return own + (
        f" The model it changes: {base.license}." if base else " The model it changes has a license of its own."
    )


def _find_base(adapter: Adapter) -> CheckpointInfo | None:
    return find_checkpoint(adapter.metadata.get("base_model", ""))


def _link_base(adapter: Adapter) -> str:
    name, base = adapter.metadata.get("base_model", ""), _find_base(adapter)
    if base is None:
        return f"`{_clean(Path(name).name)}`" if name else ""
    return f"[{base.name}]({base.page})" if base.page else f"`{base.name}`"


def _format_sample(sample: Sample) -> str:
    title = f"`{_clean(sample.prompt)}`" if sample.prompt else Path(sample.file).stem
    note = f" ({sample.note})" if sample.note else ""
    return f'{title}{note}: [{Path(sample.file).name}]({sample.file})\n\n<audio controls src="{sample.file}"></audio>'


def _format_code(language: str, lines: Sequence[str]) -> str:
    return f"```{language}\n{chr(10).join(line.replace('```', chr(39) * 3) for line in lines)}\n```" if lines else ""


def _clean(text: str | None) -> str:
    """Clean text of what would end the Markdown code that it stands in."""
    return " ".join((text or "").replace("`", "'").split())
