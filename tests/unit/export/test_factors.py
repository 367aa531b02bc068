"""Adapters as inputs: files of `sa3-export scales` hold effective weights and make the latents of `sa3-generate`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from helpers.generation import inpaint
from helpers.nano_adapters import write_adapters
from helpers.onnx_runner import load_exact, measure_error, run_modules, write_noise
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.adapters.layer_filter import find_adaptable_layers
from sa3train.cli.export import main
from sa3train.core.errors import SA3Error
from sa3train.export import export_onnx
from sa3train.export.factors import add_lora_inputs
from sa3train.export.graphs import build_graphs
from sa3train.export.package import load_exportable

RANK, LIMIT = 6, 1e-4
KINDS = ("lora", "dora-rows", "dora-cols", "bora", "lora-xs", "dora-rows-xs", "dora-cols-xs", "bora-xs")
STACK = {"dora-rows": 0.8, "lora": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter of each kind, named so."""
    folder = tmp_path_factory.mktemp("factors")
    write_adapters(folder, {kind: kind for kind in KINDS})
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> Iterator[tuple[Any, Path]]:
    """The runner on the graphs of nano-base with inputs, and its folder."""
    with run_modules(folder / "base", lora_inputs=RANK) as found:
        yield found


def write(folder: Path, strengths: dict[str, float], *flags: str, name: str = "inputs") -> int:
    loras = [word for kind, each in strengths.items() for word in ("--lora", f"{folder / kind}.safetensors={each}")]
    target = folder / f"{name}.safetensors"
    return main(["scales", "--model", "nano-base", "--rank", str(RANK), *loras, *flags, "--overwrite", str(target)])


@pytest.mark.parametrize(
    ("strengths", "factor"),
    [
        (STACK, 1.0),
        (STACK | {"dora-rows-xs": -0.3}, 0.7),
        ({"dora-cols": 0.7, "dora-cols-xs": 1.2, "lora-xs": 0.4}, 1.5),
        ({"bora": 1.0, "lora": 0.3}, 1.0),
        ({"bora-xs": 1.0}, 1.0),
    ],
)
def test_inputs_give_the_effective_weights(folder: Path, strengths: dict[str, float], factor: float) -> None:
    assert write(folder, strengths) == 0
    generator = load_exact(folder, {kind: factor * each for kind, each in strengths.items()})
    layers = find_adaptable_layers(generator.model.get_adapter_root())
    before = {path: layer.weight.detach().clone() for path, layer in layers.items()}
    generator.stack.apply(None)
    with safe_open(folder / "inputs.safetensors", "pt") as file:
        assert file.metadata()["fixed"] == json.dumps("bora" in " ".join(strengths))
        for path, W in before.items():
            A, B, rows, columns = (
                file.get_tensor(f"{path}.{part}") for part in ("lora_A", "lora_B", "rows", "columns")
            )
            assert len(A) == RANK
            found = (1 + factor * rows)[:, None] * W.flatten(1) * (1 + factor * columns) + factor * B @ A
            exact = layers[path].weight.flatten(1)
            assert float((found - exact).norm()) < 1e-5 * float((exact - W.flatten(1)).norm())


SLOW = [pytest.param(mode, marks=pytest.mark.slow) for mode in ("init", "inpaint", "weaker")]


@pytest.mark.parametrize("mode", ["text", *SLOW])
def test_a_host_makes_the_latents_of_the_exact_path(folder: Path, base: tuple[Any, Path], mode: str) -> None:
    runner, exported = base
    audio = write_noise(folder / "in.wav")
    assert write(folder, STACK) == 0
    words, changed = {
        "text": ("", {}),
        "init": (f"--init-audio {audio} --init-noise-level 0.8", {"init_audio": audio, "init_noise_level": 0.8}),
        "inpaint": (f"--inpaint-audio {audio} --inpaint 1 2.5", inpaint(audio, 1, 2.5)),
        "weaker": ("--lora-strength 0.5", {}),
    }[mode]
    flags, settings = f"--steps 4 --cfg-scale 1 {words}".split(), {"steps": 4, "cfg_scale": 1.0, **changed}
    exact = load_exact(folder, {kind: each * (0.5 if mode == "weaker" else 1) for kind, each in STACK.items()})
    given = [*flags, "--lora", str(folder / "inputs.safetensors")]
    assert measure_error(runner, exact, exported, given, **settings) < LIMIT
    if mode == "text":
        assert measure_error(runner, exact, exported, flags, **settings) > 100 * LIMIT
        assert measure_error(runner, load_exact(folder, {}), exported, flags, **settings) < LIMIT


def test_the_runner_refuses_what_does_not_fit(folder: Path, base: tuple[Any, Path], tmp_path: Path) -> None:
    runner, exported = base
    assert write(folder, {"bora": 1.0}) == 0
    with safe_open(folder / "inputs.safetensors", "pt") as file:
        right = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    cases = {
        "fixed": (right, ["--lora-strength", "0.5"]),
        "rank": (right | {"rank": "4"}, []),
        "fingerprint": (right | {"fingerprint": "0"}, []),
        "version": (right | {"version": "2"}, []),
    }
    for word, (metadata, flags) in cases.items():
        save_file(tensors, tmp_path / "x.safetensors", metadata)
        arguments = ["-p", "x", "-o", str(tmp_path / "out.wav"), "--lora", str(tmp_path / "x.safetensors"), *flags]
        with pytest.raises(SystemExit, match=rf"x\.safetensors is not of .* \({word}\): .*sa3-export scales"):
            runner.main([str(exported), *arguments])
    wrong = r"\(fingerprint, format, "
    others = {
        folder / "bora.safetensors": wrong,
        exported / "manifest.json": wrong,
        tmp_path / "none": "none is missing",
    }
    for path, message in others.items():
        with pytest.raises(SystemExit, match=message):
            runner.main([str(exported), "-p", "x", "-o", str(tmp_path / "out.wav"), "--lora", str(path)])
    assert not (tmp_path / "out.wav").exists()


@pytest.mark.parametrize(
    ("strengths", "flags", "message"),
    [
        ({"bora": 0.8}, "", "bora at 0.8.*Bake the adapters in"),
        ({"dora-rows": 1.0, "dora-cols": 1.0}, "", "dora-rows at 1, dora-cols at 1.*Bake"),
        (dict.fromkeys(("lora", "lora-xs", "dora-rows", "dora-rows-xs"), 1.0), "", "rank 8 together.*inputs 6"),
        ({"lora": 1.0}, "--rank 0", "from 1 to"),
        ({}, "--lora {0}/lora.safetensors=0.2..0.9", "0.2..0.9"),
        ({}, "--lora {0}/lora.safetensors@0.1-0.5", "Remove @MIN-MAX"),
        ({}, "--lora {0}/bias.safetensors", "changes the bias.*Bake it in"),
    ],
)
def test_what_inputs_cannot_hold_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], strengths: dict[str, float], flags: str, message: str
) -> None:
    adapter = load_adapter(folder / "lora.safetensors")
    path, params = next(iter(adapter.tensors.items()))
    tensors = {path: {**params, "diff_b": torch.ones(len(params["lora_B"]))}}
    save_adapter(folder / "bias.safetensors", type(adapter)(adapter.spec, tensors, adapter.metadata))
    assert write(folder, strengths, *flags.format(folder).split(), name="refused") == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (folder / "refused.safetensors").exists()


def test_a_layer_of_two_graphs_has_inputs_in_both() -> None:
    model = load_exportable("nano-base", ()).model
    graphs = build_graphs(model)
    found = add_lora_inputs(model, {**graphs, "again": graphs["step"]}, 2)
    assert len(graphs["step"].inputs) < len(found["step"].inputs)
    assert found["again"].inputs.keys() == found["step"].inputs.keys()
    assert found["decoder"].inputs.keys() == graphs["decoder"].inputs.keys()


def test_inputs_exclude_baked_adapters(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SA3Error, match="lora_inputs excludes"):
        export_onnx("nano", tmp_path / "out", [object()], lora_inputs=4)  # type: ignore[list-item]
    with pytest.raises(SA3Error, match="from 1 to"):
        export_onnx("nano", tmp_path / "out", lora_inputs=0)
