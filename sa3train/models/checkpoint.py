"""Checkpoints in the released layout, loaded strictly: `load_checkpoint` (whole models), `load_autoencoder` (SAME)."""

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sa3train.core.errors import CheckpointError
from sa3train.models import hub
from sa3train.models.autoencoder import Autoencoder
from sa3train.models.blocks import inverse_frequencies
from sa3train.models.conditioners import Conditioner
from sa3train.models.config import ModelConfig
from sa3train.models.dit import DiT
from sa3train.models.hub import TextEncoderSource, locate, text_encoder_source
from sa3train.models.parse import is_autoencoder, parse_autoencoder, parse_model, read_config
from sa3train.models.precision import exact_fp32_convolutions, fast_fp32_products
from sa3train.models.weight_files import check_names, fingerprint_of, read_tensors, remembered, tensor_shapes

#: State-dict prefix of each part in a released file.
PREFIXES = {"dit": "model.model.", "conditioner": "conditioner.", "autoencoder": "pretransform.model."}
ENCODER = "pretransform.model.encoder."


@dataclass(frozen=True, eq=False)
class StableAudio3:
    """A loaded model. Parts that were not asked for are None. Weights are frozen (`requires_grad` off)."""

    name: str
    path: Path
    config: ModelConfig
    dit: DiT
    conditioner: Conditioner
    autoencoder: Autoencoder
    sibling: str | None

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sample_rate

    @property
    def objective(self) -> str:
        """ "rectified_flow" (base) or "rf_denoiser" (post-trained)."""
        return self.config.objective

    @property
    def latent_channels(self) -> int:
        """Channels of a latent frame."""
        return self.config.dit.latent_width

    @property
    def downsampling_ratio(self) -> int:
        """Samples per latent frame."""
        return self.config.autoencoder.downsampling_ratio

    @property
    def max_frames(self) -> int:
        """The longest generation in latent frames."""
        return self.config.sample_size // self.downsampling_ratio

    def adaptable(self) -> nn.ModuleDict:
        """The root for adapters: module paths in it are the native adapter keys (`model.…`, `conditioners.…`).

        The same object at every call. The text encoder is not in it. Raises `ValueError` when the model was loaded
        without its DiT or conditioner.
        """
        if self.dit is None or self.conditioner is None:
            raise ValueError("adapters need parts=('dit', 'conditioner')")
        return self._adaptable

    @functools.cached_property
    def _adaptable(self) -> nn.ModuleDict:
        return nn.ModuleDict({"model": self.dit, "conditioners": self.conditioner.conditioners})

    def fingerprint(self) -> str:
        """Hex digest of the DiT's and the conditioner's weights in the file: the base an adapter belongs to.

        Equal for fp32 and bf16 copies; kept in the cache, since a large file takes seconds to read.
        """
        prefixes = (PREFIXES["dit"], PREFIXES["conditioner"])
        return _file_fingerprint(self.path / "model.safetensors", prefixes)

    def autoencoder_fingerprint(self) -> str:
        """Hex digest of the file's autoencoder, loaded or not: what latents for this model must be made with."""
        prefix = PREFIXES["autoencoder"]
        return _file_fingerprint(self.path / "model.safetensors", (prefix,), prefix)


def load_checkpoint(
    name_or_path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    parts: tuple[str, ...] = ("dit", "conditioner", "autoencoder"),
    encoder_later: bool = False,
) -> StableAudio3:
    """Load a model by registry name (found in huggingface_hub's cache, or downloaded) or from a folder.

    The file must hold exactly the tensors its config describes, whichever `parts` are asked for; those alone are
    read. The text encoder is left on disk until it is used, and always runs in its own dtype; with `encoder_later` so
    is the autoencoder's encoder, which text-to-audio does without.

    Raises `CheckpointError`: unknown name, no such folder, file missing or cut short, another architecture, gated
    repository, no network.
    """
    if unknown := set(parts) - set(PREFIXES):
        raise ValueError(f"parts {sorted(unknown)} do not exist; there are {', '.join(PREFIXES)}")
    entry = hub.find(os.fspath(name_or_path))
    if entry is not None and entry.kind == "autoencoder":
        raise _only_autoencoder(name_or_path)
    files = locate(name_or_path)
    raw = read_config(files.config)
    if is_autoencoder(raw):
        raise _only_autoencoder(name_or_path)
    config = parse_model(raw, str(files.config))
    modules = build(config, text_encoder_source(files, config.conditioner.text))
    modules["autoencoder"].chunked = config.chunked
    later = encoder_later and "autoencoder" in parts
    _fill(files.weights, modules, PREFIXES, parts, device, dtype, without=(ENCODER,) if later else ())
    modules["autoencoder"].file_fingerprint = _autoencoder_fingerprint(files.weights, PREFIXES["autoencoder"])
    if later:
        modules["autoencoder"].later = functools.partial(_read_encoder, files.weights)
    kept: Any = {name: module if name in parts else None for name, module in modules.items()}
    sibling = files.entry.sibling if files.entry is not None else None
    return StableAudio3(files.name, files.folder, config, **kept, sibling=sibling)


def load_autoencoder(
    name_or_path: str | os.PathLike[str], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """Load SAME alone, from a stand-alone repository or folder or out of a whole model; it runs whole unless asked.

    Raises `CheckpointError` as `load_checkpoint` does.
    """
    files = locate(name_or_path)
    raw = read_config(files.config)
    if is_autoencoder(raw):
        config, prefix = parse_autoencoder(raw, str(files.config)), ""
        with torch.device("meta"), _Uninitialised():
            modules: dict[str, Any] = {"autoencoder": Autoencoder(config)}
        prefixes: Mapping[str, str] = {"autoencoder": ""}
    else:
        model = parse_model(raw, str(files.config))
        modules = build(model, text_encoder_source(files, model.conditioner.text))
        prefixes, prefix = PREFIXES, PREFIXES["autoencoder"]
    _fill(files.weights, modules, prefixes, ("autoencoder",), device, dtype)
    autoencoder: Autoencoder = modules["autoencoder"]
    autoencoder.file_fingerprint = _autoencoder_fingerprint(files.weights, prefix)
    return autoencoder


class _Uninitialised(TorchFunctionMode):
    """Leaves out `torch.nn.init`: without effect on the meta device, where what it imports takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _only_autoencoder(name_or_path: str | os.PathLike[str]) -> CheckpointError:
    return CheckpointError(
        f"{name_or_path} is a stand-alone autoencoder: it encodes and decodes but generates nothing. Give a whole "
        f"model, such as nano or small-music-base."
    )


def build(config: ModelConfig, source: TextEncoderSource, device: str = "meta") -> dict[str, Any]:
    """The three parts of `config`, by name; on the meta device they hold names and shapes only."""
    with torch.device(device), _Uninitialised() if device == "meta" else contextlib.nullcontext():
        return {
            "dit": DiT(config.dit),
            "conditioner": Conditioner(config.conditioner, source),
            "autoencoder": Autoencoder(config.autoencoder),
        }


def released_state(modules: Mapping[str, nn.Module], prefixes: Mapping[str, str] = PREFIXES) -> dict[str, Tensor]:
    """All tensors of the parts under the names of the released files."""
    return {
        f"{prefixes[part]}{name}": tensor
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def _fill(
    path: Path,
    modules: Mapping[str, nn.Module],
    prefixes: Mapping[str, str],
    parts: tuple[str, ...],
    device: torch.device | str,
    dtype: torch.dtype,
    without: tuple[str, ...] = (),
) -> None:
    """Check the whole file against all modules, then read the asked parts into theirs, but for names in `without`."""
    exact_fp32_convolutions()
    if torch.device(device).type == "cpu":
        fast_fp32_products()
    expected = {name: tuple(tensor.shape) for name, tensor in released_state(modules, prefixes).items()}
    check_names(path, tensor_shapes(path), expected)
    for part in parts:
        _read_into(path, prefixes[part], modules[part], device, dtype, without)


def _read_into(
    path: Path,
    prefix: str,
    module: nn.Module,
    device: torch.device | str,
    dtype: torch.dtype,
    without: tuple[str, ...] = (),
) -> None:
    """Read the tensors of `module`, whose names in the file begin with `prefix`."""
    names = [name for name in (f"{prefix}{own}" for own in module.state_dict()) if not name.startswith(without)]
    state = {}
    for name, tensor in read_tensors(path, names, device, dtype):
        state[name.removeprefix(prefix)] = _rotary(path, name, tensor) if name.endswith("inv_freq") else tensor
    module.load_state_dict(state, strict=not without, assign=True)
    module.requires_grad_(False).eval()


def _read_encoder(path: Path, encoder: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """The encoder that was left out. Raises `CheckpointError` when the file has gone since."""
    tensor_shapes(path)
    _read_into(path, ENCODER, encoder, device, dtype)


def _rotary(path: Path, name: str, tensor: Tensor) -> Tensor:
    """The exact frequencies, after a look at the file's: in a 16-bit file they are rounded."""
    exact = inverse_frequencies(tensor.device)
    if not torch.allclose(tensor.float(), exact, rtol=1e-2):
        raise CheckpointError(
            f"{path}: {name} holds other rotary frequencies than Stable Audio 3's. Use the released file."
        )
    return exact


def _file_fingerprint(path: Path, prefixes: tuple[str, ...], strip: str = "") -> str:
    def compute() -> str:
        names = sorted(name for name in tensor_shapes(path) if name.startswith(prefixes))
        tensors = read_tensors(path, names, "cpu", torch.bfloat16)
        return fingerprint_of((name.removeprefix(strip), tensor) for name, tensor in tensors)

    return remembered(path, ",".join(prefixes), compute)


def _autoencoder_fingerprint(path: Path, prefix: str) -> Callable[[], str]:
    return functools.partial(_file_fingerprint, path, (prefix,), prefix)
