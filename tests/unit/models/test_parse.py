"""The released architectures, built from the released configs, have exactly the released names and shapes."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.golden import GOLDEN
from sa3train.core.errors import CheckpointError
from sa3train.models.autoencoder import Autoencoder
from sa3train.models.checkpoint import PREFIXES, build_modules, collect_state_dict
from sa3train.models.config_reader import read_config_file
from sa3train.models.parse import complete_config, is_autoencoder, parse_autoencoder, parse_model
from sa3train.models.text_source import TextEncoderSource

MANIFESTS = json.loads((GOLDEN / "state_dict_manifests.json").read_text())
CONFIGS = sorted((GOLDEN / "configs").glob("*.json"))
MODELS = [path for path in CONFIGS if not path.stem.startswith("same")]


def manifest_of(path: Path) -> dict[str, list[int]]:
    return MANIFESTS["medium" if path.stem.startswith("medium") or path.stem == "same-l" else "small"]


def test_all_released_configs_are_here() -> None:
    assert len(CONFIGS) == 8
    assert len(MODELS) == 6


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_names_and_shapes(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = parse_model(read_config_file(path), path.name)
    state = collect_state_dict(build_modules(config, TextEncoderSource((), ())))
    assert {name: list(tensor.shape) for name, tensor in state.items()} == manifest_of(path)
    assert all(tensor.device.type == "meta" for tensor in state.values())
    assert not caplog.records, "a released config has a key the parser does not know"


@pytest.mark.parametrize("path", [path for path in CONFIGS if path not in MODELS], ids=lambda path: path.stem)
def test_standalone_autoencoder_has_no_prefix(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = read_config_file(path)
    assert is_autoencoder(raw)
    with torch.device("meta"):
        state = Autoencoder(parse_autoencoder(raw, path.name)).state_dict()
    prefix = PREFIXES["autoencoder"]
    wanted = {name.removeprefix(prefix): shape for name, shape in manifest_of(path).items() if name.startswith(prefix)}
    assert {name: list(tensor.shape) for name, tensor in state.items()} == wanted
    assert not caplog.records


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_what_the_configs_say(path: Path) -> None:
    config = parse_model(read_config_file(path), path.name)
    assert config.objective == ("rectified_flow" if path.stem.endswith("-base") else "rf_denoiser")
    assert config.dit.differential == path.stem.startswith("medium")
    assert config.chunked
    assert config.autoencoder.downsampling_ratio == 4096
    assert config.sample_size / config.sample_rate == pytest.approx(380 if "medium" in path.stem else 120, abs=1)
    small = config.autoencoder.encoder.chunk_size is not None
    assert small == path.stem.startswith("small")
    assert config.autoencoder.decoder.sinusoidal_blocks == (0 if small else 8)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("model_type",), "lm", "model_type is 'lm'"),
        (("model", "diffusion", "type"), "uncond", "type is 'uncond'"),
        (("model", "diffusion", "diffusion_objective"), "v", "diffusion_objective is 'v'"),
        (("model", "diffusion", "config", "global_cond_type"), "prepend", "global_cond_type is 'prepend'"),
        (("model", "diffusion", "config", "patch_size"), 2, "patch_size is 2"),
        (("model", "diffusion", "config", "num_heads"), 7, "num_heads is 7"),
        (("model", "diffusion", "config", "depth"), "many", "of the wrong type"),
        (("model", "diffusion", "config", "depth"), 0, "must be positive"),
        (("model", "diffusion", "config", "local_add_cond_dim"), 5, "io_channels \\+ 1"),
        (("model", "conditioning", "cond_dim"), 5, "cond_dim"),
        (("model", "conditioning", "configs"), [], "prompt and seconds_total are expected"),
        (("model", "pretransform", "config", "bottleneck", "type"), "vae", "type is 'vae'"),
        (("model", "pretransform", "config", "encoder", "type"), "oobleck", "type is 'oobleck'"),
        (("model", "pretransform", "config", "encoder", "config", "dyt"), False, "dyt is False"),
        (("model", "pretransform", "config", "encoder", "config", "strides"), [4, 4], "one stage"),
        (("model", "pretransform", "config", "latent_dim"), 8, "dim is 256, where 8"),
        (("model", "pretransform"), 5, "should be a JSON object"),
    ],
)
def test_another_architecture_is_refused(place: tuple[str, ...], value: object, message: str) -> None:
    raw = read_config_file(GOLDEN / "configs" / "small-music.json")
    spot = raw
    for key in place[:-1]:
        spot = spot[key]
    spot[place[-1]] = value
    with pytest.raises(CheckpointError, match=message):
        parse_model(raw, "model_config.json")


def test_a_missing_key_is_named_with_its_place() -> None:
    raw = read_config_file(GOLDEN / "configs" / "small-music.json")
    del raw["model"]["diffusion"]["config"]["embed_dim"]
    with pytest.raises(CheckpointError, match=r"x\.json: model\.diffusion\.config\.embed_dim is missing"):
        parse_model(raw, "x.json")


def test_an_unknown_key_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    raw = read_config_file(GOLDEN / "configs" / "small-music.json")
    raw["model"]["diffusion"]["config"]["flux_capacitor"] = True
    parse_model(raw, "x.json")
    assert "flux_capacitor" in caplog.text


def list_values(node: Any, place: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """Every value of a JSON object by its place."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found = {key: value for name, child in children for key, value in list_values(child, (*place, name)).items()}
    return found or {place: node}


@pytest.mark.parametrize("which", ["plain", "diff"])
def test_keys_that_the_released_code_would_take_otherwise_are_completed(which: str) -> None:
    """From the config that was recorded with the released code, without the keys that it and `parse` read otherwise."""
    recorded = read_config_file(GOLDEN / which / "model_config.json")
    raw = copy.deepcopy(recorded)
    model = raw["model"]
    for node in (model["pretransform"]["config"], model["pretransform"]["config"]["pretransform"]["config"], model):
        for key in ("downsampling_ratio", "io_channels", "channels", "patch_size"):
            node.pop(key, None)
    for entry in model["conditioning"]["configs"]:
        for key in ("padding_mode", "fourier_features_type", "min_val", "max_val"):
            entry["config"].pop(key, None)
    kept = ("io_channels", "embed_dim", "depth", "num_heads", "cond_token_dim", "global_cond_dim", "local_add_cond_dim")
    dit = model["diffusion"]["config"]
    differential = {"differential": dit["attn_kwargs"]["differential"]}
    others = {"attn_kwargs": differential, "num_memory_tokens": dit["num_memory_tokens"]}
    model["diffusion"]["config"] = {key: dit[key] for key in kept} | others
    for key in ("cross_attention_cond_ids", "global_cond_ids", "local_add_cond_ids", "distribution_shift_options"):
        del model["diffusion"][key]
    for part in ("encoder", "decoder"):
        for key in ("differential", "dim_heads", "variable_stride", "dyt", "chunk_size", "chunk_midpoint_shift"):
            model["pretransform"]["config"][part]["config"].pop(key, None)
    del model["pretransform"]["config"]["bottleneck"]["config"]["auto_scale"]
    completed = complete_config(raw, which)
    wanted, found = list_values(recorded), list_values(completed)
    unused = {"checkpointing", "iterate_batch"}
    assert {place for place in wanted if found.get(place) != wanted[place]} <= {p for p in wanted if p[-1] in unused}
    assert parse_model(completed, which) == parse_model(recorded, which)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_completed_config_says_the_same(path: Path) -> None:
    raw = read_config_file(path)
    completed = complete_config(raw, path.name)
    parse = parse_autoencoder if is_autoencoder(raw) else parse_model
    assert parse(completed, path.name) == parse(raw, path.name)
    found = list_values(completed)
    assert all(found[place] == value for place, value in list_values(raw).items())
