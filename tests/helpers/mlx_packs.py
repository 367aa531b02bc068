"""The golden models as packs of the MLX builds, written from the names that the released MLX code has."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from helpers.golden import GOLDEN, PACKED

RECORDED = PACKED / "mlx"
CODECS = {"plain": "s", "diff": "l"}
RECORDED_CASES = {"encoder": "same.encode.8192", "decoder": "same.decode.2"}
"""Golden cases whose outputs of the MLX code are recorded."""
_SAME = "pretransform.model."
_STACKS = {
    "encoder": ("encoder.layers.0.", "encoder.layers.2.", "project_out."),
    "decoder": ("decoder.layers.3.", "decoder.layers.1.", "project_in."),
}
_RENAMED = (
    (".self_attn.", ".attn."),
    (".ff.ff.0.proj.", ".ff.glu_proj."),
    (".ff.ff.2.", ".ff.proj_out."),
    ("transformers.", "blocks."),
)
TEXT_CONFIG = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 96, "vocab_size": 600, "query_pre_attn_scalar": 32,
}  # fmt: skip


def make_dit(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Make the arrays of the DiT's pack."""
    arrays = {}
    for name, tensor in state.items():
        if name.startswith("conditioner."):
            end = "padding_embedding" if "prompt" in name else f"seconds_total_{name.rpartition('.')[2]}"
            arrays[f"cond.{end}"] = tensor.half().numpy()
        elif name.startswith("model.model."):
            key = name.removeprefix("model.model.").replace(".to_local_embed.", ".to_local_embed.seq.")
            key = key.removesuffix("gamma") + "weight" if key.endswith(".gamma") else key
            arrays[key] = (tensor.mT if "process_conv" in key else tensor).half().numpy()
    return arrays


def make_side(state: dict[str, Tensor], side: str) -> dict[str, np.ndarray]:
    """Make the arrays of the pack of SAME's encoder or decoder."""
    stack, linear, packed_linear = _STACKS[side]
    own = ("running_std", "scaling_factor", "bias") if side == "encoder" else ("running_std",)
    arrays = {name: state[f"{_SAME}bottleneck.{name}"].float().numpy() for name in own}
    for name, tensor in ((name.removeprefix(_SAME), tensor.float()) for name, tensor in state.items()):
        if name.startswith(linear):
            arrays[f"{packed_linear}{name.removeprefix(linear)}"] = tensor.numpy()
        elif name.endswith("mapping.weight_v") and name.startswith(stack):
            gain = state[f"{_SAME}{stack}mapping.weight_g"].float()
            arrays["mapping.weight"] = (tensor * gain / tensor.norm(dim=(1, 2), keepdim=True)).numpy()
        elif name.startswith(stack) and not name.endswith(("inv_freq", "weight_g")):
            key = name.removeprefix(stack)
            for released, packed in _RENAMED:
                key = key.replace(released, packed)
            arrays[key] = tensor.numpy()
    return arrays


def make_text() -> dict[str, np.ndarray]:
    """Make the arrays of a small text encoder's pack, from a generator whose stream never changes."""
    rng, config = np.random.RandomState(3), TEXT_CONFIG
    width, inner, rows = config["hidden_size"], config["intermediate_size"], 64
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{part}_proj.weight": (rows, width) for part in "qkv"}
    shapes |= {"self_attn.o_proj.weight": (width, rows), "mlp.down_proj.weight": (width, inner)}
    shapes |= {f"mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
    norms = ("pre_self_attn", "post_self_attn", "pre_feedforward", "post_feedforward")
    shapes |= {f"{norm}_layernorm.weight": (width,) for norm in norms}
    shapes = {f"layers.{layer}.{name}": shape for layer in range(2) for name, shape in shapes.items()}
    shapes |= {"embed_tokens.weight": (config["vocab_size"], width), "norm.weight": (width,)}
    scale = {1: 0.3, 2: width**-0.5}
    arrays = {name: (rng.randn(*shape) * scale[len(shape)]).astype(np.float16) for name, shape in shapes.items()}
    arrays["rope_inv_freq"] = (10_000.0 ** (-np.arange(0, 32, 2) / 32)).astype(np.float16)
    arrays["META"] = np.frombuffer(json.dumps(config).encode(), np.uint8)
    arrays["TOKENIZER_MODEL"] = np.frombuffer((RECORDED / "tokenizer.model").read_bytes(), np.uint8)
    return arrays


def thin_out(output: np.ndarray) -> np.ndarray:
    """Take every fifth value of the output of an encoder or decoder, as it is recorded."""
    return output.reshape(-1)[::5]


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Save arrays as numpy does."""
    np.savez(path, **dict[str, Any](arrays))


def write_packs(kind: str, folder: Path, state: dict[str, Tensor] | None = None) -> Path:
    """Write a golden model, or one with other values, as packs with its config and text encoder; return the DiT's."""
    state = state or load_file(GOLDEN / kind / "model.safetensors")
    pack = folder / f"dit_{kind}_f16.npz"
    save_arrays(pack, make_dit(state))
    for side in _STACKS:
        save_arrays(folder / f"same_{CODECS[kind]}_{side}_f32.npz", make_side(state, side))
    shutil.copy(GOLDEN / kind / "model_config.json", folder)
    shutil.copytree(GOLDEN / kind / "t5gemma", folder / "t5gemma")
    return pack
