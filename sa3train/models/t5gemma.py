"""T5Gemma's encoder, forward only, from the released files. Our own, since importing transformers takes seconds.

The values are those of `transformers.T5GemmaEncoderModel` with eager attention, against which it is tested.
Shape legend: B prompts, L tokens, H heads, E head width, D width.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from sa3train.core.device import move_to_device
from sa3train.core.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PREFIXES = ("encoder.", "model.encoder.")  # of an encoder alone, and within a whole T5Gemma
EMBEDDING = "embed_tokens.weight"
_LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_NORMS = ("pre_self_attn", "post_self_attn", "pre_feedforward", "post_feedforward")


@dataclass(frozen=True)
class T5GemmaConfig:
    """The encoder's section of a published `config.json`.

    Attributes:
        width: Channels.
        heads: Query heads.
        key_heads: Key and value heads.
        head_width: Width of a head.
        score_scale: Factor of the attention scores.
        softcap: Limit of the scores by tanh; None is no limit.
        eps: Epsilon of the norms.
        rotary_base: Base of the rotary frequencies.
        windows: For each layer how far a token sees; None = all.
    """

    width: int
    heads: int
    key_heads: int
    head_width: int
    score_scale: float
    softcap: float | None
    eps: float
    rotary_base: float
    windows: tuple[int | None, ...]


def read_encoder_config(folder: Path) -> T5GemmaConfig:
    """Read `config.json` of a text encoder.

    Args:
        folder: Folder of the encoder.

    Returns:
        The config.

    Raises:
        CheckpointError: It is not a T5Gemma of the released kind.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        text: dict[str, Any] = raw.get("encoder", raw)
        rope = text.get("rope_parameters") or {"rope_type": "default", "rope_theta": text.get("rope_theta", 10_000.0)}
        kind = (
            text.get("hidden_activation", "gelu_pytorch_tanh"),
            text.get("attention_bias", False),
            rope["rope_type"],
        )
        layers = int(text["num_hidden_layers"])
        types = text.get("layer_types") or [("full" if i % 2 else "sliding") + "_attention" for i in range(layers)]
        config = T5GemmaConfig(
            width=int(text["hidden_size"]),
            heads=int(text["num_attention_heads"]),
            key_heads=int(text["num_key_value_heads"]),
            head_width=int(text["head_dim"]),
            score_scale=float(text["query_pre_attn_scalar"]) ** -0.5,
            softcap=text.get("attn_logit_softcapping", 50.0),
            eps=float(text.get("rms_norm_eps", 1e-6)),
            rotary_base=float(rope["rope_theta"]),
            windows=tuple(text.get("sliding_window") if name == "sliding_attention" else None for name in types),
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not describe a T5Gemma encoder ({error!r}). Copy the released folder."
        ) from error
    if kind != ("gelu_pytorch_tanh", False, "default") or len(config.windows) != layers:
        raise CheckpointError(
            f"{path} describes another T5Gemma than the released one: {kind}. Copy the released folder."
        )
    return config


class T5GemmaEncoder:
    """The encoder's tensors by their names without prefix, and its forward pass. Never trained, so not an `nn.Module`.

    Attributes:
        config: Sizes.
        weights: Tensors by name.
    """

    def __init__(self, config: T5GemmaConfig, weights: dict[str, Tensor]) -> None:
        self.config, self.weights = config, weights

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its file, in which it computes."""
        return self.weights[EMBEDDING].dtype

    def to(self, device: torch.device) -> "T5GemmaEncoder":
        """Move the encoder to a device, but for its embedding table.

        The table stays where it is, as pages of the file: it has 256 000 rows, two thirds of the encoder's memory, of
        which a prompt reads a few dozen.

        Args:
            device: Where it computes.

        Returns:
            The same encoder.
        """
        rest = {name: tensor.to(device) for name, tensor in self.weights.items() if name != EMBEDDING}
        self.weights = {EMBEDDING: self.weights[EMBEDDING], **rest}
        return self

    def __call__(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Compute hidden states (B, L, D) of tokens; True in the mask = token. Padding comes last and is never seen.

        `ids_BL` is on the CPU, where they are looked up, the mask on the encoder's device.
        """
        config, length = self.config, ids_BL.shape[1]
        x_BLD = move_to_device(F.embedding(ids_BL, self.weights[EMBEDDING]), mask_BL.device)
        x_BLD = x_BLD * torch.tensor(config.width**0.5, dtype=x_BLD.dtype)
        positions_L = torch.arange(length, device=mask_BL.device)
        rotary = _compute_rotary(positions_L, config, x_BLD.dtype)
        distance_LL = (positions_L[:, None] - positions_L[None, :]).abs()
        for index, window in enumerate(config.windows):
            seen_B1LL = mask_BL[:, None, None, :].expand(-1, 1, length, -1)
            if window is not None:
                seen_B1LL = seen_B1LL.logical_and(distance_LL <= window)  # coremltools knows no "&"
            name = f"layers.{index}."
            attended = self._attention(name, self._norm(f"{name}pre_self_attn_layernorm", x_BLD), rotary, seen_B1LL)
            x_BLD = x_BLD + self._norm(f"{name}post_self_attn_layernorm", attended)
            fed = self._feed_forward(f"{name}mlp.", self._norm(f"{name}pre_feedforward_layernorm", x_BLD))
            x_BLD = x_BLD + self._norm(f"{name}post_feedforward_layernorm", fed)
        return self._norm("norm", x_BLD)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def _norm(self, name: str, x_BLD: Tensor) -> Tensor:
        """Apply RMS norm in fp32; its weight counts from 1."""
        x = x_BLD.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.eps)
        return (x * (1.0 + self.weights[f"{name}.weight"].float())).to(x_BLD.dtype)

    def _feed_forward(self, name: str, x_BLD: Tensor) -> Tensor:
        gate = F.gelu(self._linear(f"{name}gate_proj", x_BLD), approximate="tanh")
        return self._linear(f"{name}down_proj", gate * self._linear(f"{name}up_proj", x_BLD))

    def _attention(self, name: str, x_BLD: Tensor, rotary: tuple[Tensor, Tensor], seen_B1LL: Tensor) -> Tensor:
        config = self.config
        q, k, v = (
            self._linear(f"{name}self_attn.{part}_proj", x_BLD).unflatten(-1, (-1, config.head_width)).transpose(1, 2)
            for part in "qkv"
        )
        q_BHLE, k_BHLE = _rotate(q, rotary), _rotate(k, rotary)
        repeats = config.heads // config.key_heads
        k_BHLE, v_BHLE = k_BHLE.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        scores_BHLL = q_BHLE @ k_BHLE.mT * config.score_scale
        if config.softcap is not None:
            scores_BHLL = torch.tanh(scores_BHLL / config.softcap) * config.softcap
        scores_BHLL = scores_BHLL.masked_fill(~seen_B1LL, torch.finfo(scores_BHLL.dtype).min)
        shares_BHLL = scores_BHLL.softmax(dim=-1, dtype=torch.float32).to(v_BHLE.dtype)
        return self._linear(f"{name}self_attn.o_proj", (shares_BHLL @ v_BHLE).transpose(1, 2).flatten(2))


def _compute_rotary(positions_L: Tensor, config: T5GemmaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, config.head_width, 2, device=positions_L.device).float() / config.head_width
    angles_LE = (positions_L.float()[:, None] * (1.0 / config.rotary_base**exponents)).repeat(1, 2)
    return angles_LE.cos().to(dtype), angles_LE.sin().to(dtype)


def _rotate(x_BHLE: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotary
    first, second = x_BHLE.chunk(2, dim=-1)
    return x_BHLE * cos + torch.cat((-second, first), dim=-1) * sin


def load_encoder(folder: Path) -> T5GemmaEncoder:
    """Load the encoder from a folder's safetensors, also out of whole models, in the file's dtype.

    What safetensors raises for a damaged file is not translated.

    Args:
        folder: Folder with `config.json` and weights.

    Returns:
        The encoder.

    Raises:
        CheckpointError: Files or tensors are missing, or it is another encoder.
    """
    config, weights = read_encoder_config(folder), dict[str, Tensor]()
    for path in _list_weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
                if prefix is not None:
                    weights[name.removeprefix(prefix)] = file.get_tensor(name)
    if missing := [name for name in list_names(config) if name not in weights]:
        raise CheckpointError(
            f"the text encoder in {folder} lacks {len(missing)} tensors of a T5Gemma encoder, such as "
            f"encoder.{missing[0]}. Copy the released folder."
        )
    return T5GemmaEncoder(config, {name: weights[name] for name in list_names(config)})


def _list_weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS} of the text encoder. Copy the whole folder.")
    files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    return [folder / name for name in sorted(set(files.values()))]


def list_names(config: T5GemmaConfig) -> list[str]:
    """List the tensors that an encoder has.

    Args:
        config: Its sizes.

    Returns:
        Names without prefix.
    """
    parts = [*_LINEARS, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", *(f"{norm}_layernorm" for norm in _NORMS)]
    layers = [f"layers.{index}.{part}.weight" for index in range(len(config.windows)) for part in parts]
    return [EMBEDDING, "norm.weight", *layers]
