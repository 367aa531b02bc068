"""Files whose tensors and settings are odd or contradict each other, through every tool: a result, or a refusal."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.nano_adapters import write_lora_adapters
from helpers.small_model import Small
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.formats.io import load_adapter
from sa3train.adapters.layer_filter import find_adaptable_layers
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import KINDS, AdapterSpec
from sa3train.adapters.tools import (
    Truncation,
    compare_adapters,
    convert_adapter,
    inspect_adapter,
    merge_adapters,
    merge_checkpoint,
)
from sa3train.adapters.tools.service import resize_adapter, scale_adapter
from sa3train.core import safetensors_file
from sa3train.core.errors import SA3Error
from sa3train.models.checkpoint import load_checkpoint

FILES = 80
PATHS = ("model.transformer.layers.0.ff.up", "model.transformer.layers.1.ff.down")
COMFY = (
    ("lora_up.weight", "lora_down.weight", "alpha"), ("lora_up.weight", "lora_down.weight", "dora_scale"), ("diff",),
    ("diff_b",), ("lora_up.weight", "lora_down.weight", "diff_b"), ("lokr_w1", "lokr_w2"),
)  # fmt: skip
DTYPES = [torch.float32] * 30 + [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.float8_e5m2]
SETTINGS = (
    "rank", "alpha", "adapter_type", "dropout", "include", "rslora", "rank_pattern", "alpha_pattern", "options",
)  # fmt: skip
VALUES = (0, 4, None, "4", -1, 1e30, [], {}, True, [1], {"layers.0": 2}, "[1-", ["layers[0-1]"], 10**400, "dora", "oft")


def draw_tensor(rng: random.Random, name: str, rows: int, cols: int) -> Tensor:
    rank = 1 if rng.random() < 0.02 else 2
    shapes: dict[str, tuple[int, ...]] = KINDS["bora"].shapes(rows, cols, rank) | {
        "lora_up.weight": (rows, rank), "lora_down.weight": (rank, cols), "M_xs": (rank, rank), "U": (rows, rank),
        "V": (cols, rank), "diff": (rows, cols), "diff_b": (rows,), "alpha": (), "magnitude": (rows,),
        "dora_scale": rng.choice([(rows, 1), (1, cols), (rows,)]), "lokr_w1": (4, 4), "lokr_w2": (rows // 4, cols // 4),
    }  # fmt: skip
    shape = shapes[name]
    if rng.random() < 0.02:
        shape = rng.choice([(), (0,), (rows,), (2, 0), (rows, cols, 1), (cols, rows), (2, 2)])
    scale = rng.choice([0.1] * 30 + [0.0, 1e30, float("nan")])
    return (torch.randn(shape) * scale).to(rng.choice(DTYPES))


def write_odd_file(folder: Path, seed: int) -> Path:
    """Write an adapter in which about one thing is wrong."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    layers: dict[str, Any] = find_adaptable_layers(Small())
    is_native, kind = rng.random() < 0.6, KINDS[rng.choice(list(KINDS))]
    stored = {}
    for path in PATHS:
        if is_native:
            names = kind.parameters + (("U", "V") if kind.is_xs and rng.random() < 0.5 else ())
            names += ("diff_b",) if rng.random() < 0.1 else ()
            prefix = f"{path}.parametrizations.weight.0"
        else:
            names, prefix = rng.choice(COMFY), f"diffusion_model.{path.removeprefix('model.')}"
        kept = [name for name in names if rng.random() > 0.01]
        stored |= {f"{prefix}.{name}": draw_tensor(rng, name, *layers[path].weight.shape) for name in kept}
    config: dict[str, Any] = {"rank": 2, "alpha": 4, "adapter_type": kind.name}
    if rng.random() < 0.2:
        config[rng.choice(SETTINGS)] = rng.choice(VALUES)
    metadata = {"lora_config": json.dumps(config)} if rng.random() < 0.8 else None
    save_file(stored, folder / f"{seed}.safetensors", metadata)
    return folder / f"{seed}.safetensors"


def start_training(path: Path, model: Any) -> None:
    adapter = load_adapter(path)
    injected = inject(model, adapter.spec if adapter.spec.adapter_type in KINDS else AdapterSpec("lora", rank=2))
    try:
        injected.load(adapter)
    finally:
        injected.remove()


def play(path: Path, model: Any) -> None:
    stack = AdapterStack(model)
    try:
        stack.add(load_adapter(path), 0.5, allow_partial=True)
        stack.apply()
    finally:
        stack.clear()


def list_uses(path: Path, other: Path, folder: Path, model: Any) -> list[Callable[[], Any]]:
    """Everything that can be done with an adapter file."""
    truncation, sources = Truncation(2), [(path, 0.5), (other, 1.0)]
    uses: list[Callable[[], Any]] = [partial(play, path, model), partial(start_training, path, model)]
    for base, out in ((None, folder / f"{path.stem}-alone"), (model, folder / path.stem)):
        uses += [
            partial(inspect_adapter, path, base),
            partial(compare_adapters, path, other, base),
            partial(convert_adapter, path, out / "n.safetensors", "native", base),
            partial(convert_adapter, path, out / "c.safetensors", "comfy", base),
            partial(convert_adapter, path, out / "p", "peft", base),
            partial(resize_adapter, path, out / "r.safetensors", truncation, base),
            partial(merge_adapters, sources, out / "m.safetensors", base, truncation),
        ]
    return [*uses, partial(scale_adapter, path, folder / path.stem / "s.safetensors", 2.0)]


def find_refusal(act: Callable[[], Any]) -> str | None:
    """The message when `act` refuses; any error that is not for users goes on and fails the test."""
    try:
        act()
    except SA3Error as error:
        return str(error)
    return None


def test_every_tool_answers_for_every_odd_file(tmp_path: Path) -> None:
    model, files = Small(), [write_odd_file(tmp_path, seed) for seed in range(FILES)]
    readable = [path for path in files if find_refusal(partial(load_adapter, path)) is None]
    assert FILES / 4 < len(readable) < FILES
    refusals = [
        find_refusal(use)
        for path, other in zip(readable, readable[1:] + readable[:1], strict=True)
        for use in list_uses(path, other, tmp_path / "written", model)
    ]
    assert all(message is None or 20 < len(message) < 2500 for message in refusals)
    assert len(readable) < refusals.count(None) < len(refusals) - len(readable)
    assert all(torch.equal(mine, base) for mine, base in zip(model.parameters(), Small().parameters(), strict=True))


@pytest.mark.parametrize("what", ["merge", "convert", "checkpoint"])
def test_ctrl_c_leaves_nothing_half_written(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lora_adapters(tmp_path)
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    before = sorted(tmp_path.rglob("*"))

    def interrupt(_: Any, target: Any, *rest: Any) -> None:
        if isinstance(target, Path):
            target.write_bytes(b"half")
        else:
            target.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_file, "save_file", interrupt)
    monkeypatch.setattr(merge_checkpoint, "write_tensor_stream", lambda target, *rest: interrupt(rest, target))
    with pytest.raises(KeyboardInterrupt):
        if what == "merge":
            merge_adapters([(one, 1.0), (two, 1.0)], tmp_path / "m.safetensors", truncation=Truncation(2))
        elif what == "convert":
            convert_adapter(one, tmp_path / "folder")
        else:
            merge_adapters(
                [(one, 1.0)], tmp_path / "merged", load_checkpoint("nano-base", parts=("dit", "conditioner"))
            )
    assert sorted(tmp_path.rglob("*")) == before
