"""Checkpoints, loaded strictly: `load_checkpoint` (whole models, in any layout), `load_autoencoder` (SAME)."""

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sa3train.core.errors import CheckpointError
from sa3train.models import hub
from sa3train.models.autoencoder import Autoencoder
from sa3train.models.blocks import compute_rotary_frequencies
from sa3train.models.conditioners import Conditioner
from sa3train.models.config import ModelConfig
from sa3train.models.config_reader import read_config_file
from sa3train.models.diffusers_layout import open_pipeline, read_pipeline_config
from sa3train.models.dit import DiT
from sa3train.models.hub import CheckpointFiles, locate_checkpoint
from sa3train.models.mlx_layout import build_config, find_codec_kind, open_packs
from sa3train.models.parse import is_autoencoder, parse_autoencoder, parse_model
from sa3train.models.precision import disable_tf32_convolutions, enable_fast_fp32_matmul
from sa3train.models.text_source import TextEncoderSource, find_text_encoder
from sa3train.models.weight_files import WeightFiles, check_tensor_names, open_weight_file

#: State-dict prefix of each part in a released file.
PREFIXES = {"dit": "model.model.", "conditioner": "conditioner.", "autoencoder": "pretransform.model."}
ENCODER_PREFIX = "pretransform.model.encoder."


@dataclass(frozen=True, eq=False)
class StableAudio3:
    """A loaded model with frozen weights. Parts that were not asked for are None.

    Attributes:
        name: Registry name, or the name of its folder.
        path: Its folder; of MLX's packs, that of the DiT.
        config: Its architecture.
        dit: The diffusion transformer.
        conditioner: Prompt and duration.
        autoencoder: SAME.
        weights: The tensors of its files.
        sibling: Registry name of the base of a post-trained model, or the other way round.
    """

    name: str
    path: Path
    config: ModelConfig
    dit: DiT
    conditioner: Conditioner
    autoencoder: Autoencoder
    weights: WeightFiles
    sibling: str | None

    @property
    def sample_rate(self) -> int:
        """Sample rate in Hz."""
        return self.config.sample_rate

    @property
    def objective(self) -> str:
        """Objective: "rectified_flow" (base) or "rf_denoiser" (post-trained)."""
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
        """Latent frames of the longest generation."""
        return self.config.sample_size // self.downsampling_ratio

    def get_adapter_root(self, part: Literal["dit", "decoder"] = "dit") -> nn.ModuleDict:
        """Get the module that adapters are applied to. Module paths in it are those of adapters.

        The text encoder is not part of it. A model that was loaded without its DiT or conditioner is a `ValueError`.

        Args:
            part: What the adapters change: DiT and conditioner, or the autoencoder's decoder, which is loaded from the
                model's folder where it was left out.

        Returns:
            The same module in every call, with the DiT as `model` and the conditioners as `conditioners`, or with the
            decoder as `pretransform.model.decoder`.
        """
        if part == "decoder":
            return self._decoder_root
        if self.dit is None or self.conditioner is None:
            raise ValueError("load the model with parts=('dit', 'conditioner') to use adapters")
        return self._adapter_root

    @functools.cached_property
    def _adapter_root(self) -> nn.ModuleDict:
        return nn.ModuleDict({"model": self.dit, "conditioners": self.conditioner.conditioners})

    @functools.cached_property
    def _decoder_root(self) -> nn.ModuleDict:
        autoencoder = self.autoencoder or load_autoencoder(self.path)
        inner = nn.ModuleDict({"decoder": autoencoder.decoder})
        return nn.ModuleDict({"pretransform": nn.ModuleDict({"model": inner})})

    def fingerprint(self) -> str:
        """Compute a fingerprint of the DiT's and the conditioner's weights in the file: the base an adapter belongs to.

        Equal for fp32 and bf16 copies and in every layout. Cached, since a large file takes seconds to read.

        Returns:
            Hex SHA-256.
        """
        return self.weights.compute_fingerprint((PREFIXES["dit"], PREFIXES["conditioner"]))

    def sample_weights(self, part: Literal["dit", "decoder"] = "dit") -> str:
        """Sample the weights that the two fingerprints are of, see `WeightFiles.sample`.

        Args:
            part: What adapters on them change.

        Returns:
            The sample.
        """
        names = ("autoencoder",) if part == "decoder" else ("dit", "conditioner")
        return self.weights.sample(tuple(PREFIXES[name] for name in names))

    def autoencoder_fingerprint(self) -> str:
        """Compute a fingerprint of the file's autoencoder, loaded or not, with which latents must be encoded.

        Returns:
            Hex SHA-256.
        """
        prefix = PREFIXES["autoencoder"]
        return self.weights.compute_fingerprint((prefix,), prefix)


def load_checkpoint(
    name_or_path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    parts: tuple[str, ...] = ("dit", "conditioner", "autoencoder"),
    lazy_encoder: bool = False,
) -> StableAudio3:
    """Load a model.

    The file must have exactly the tensors that its config describes, whichever parts are asked for; only those are
    read. The text encoder is loaded when it is first used and always runs in its own dtype.

    Args:
        name_or_path: Registry name, found in the cache of huggingface_hub or downloaded, with `@mlx` in the open packs
            of the MLX builds, or a folder; the folder or repository of a pipeline of diffusers, and a folder with one
            DiT pack or that pack, as well.
        device: Where the parts are loaded. On the meta device they have names and shapes only, and `weights` reads the
            tensors one at a time.
        dtype: Dtype of their weights.
        parts: Any of "dit", "conditioner" and "autoencoder"; another is a `ValueError`.
        lazy_encoder: Whether to load the autoencoder's encoder on first use; text-to-audio does without it.

    Returns:
        The model.

    Raises:
        CheckpointError: The name is unknown, a file is missing, truncated or of another architecture, the repository is
            gated, or there is no network.
    """
    if unknown := set(parts) - set(PREFIXES):
        raise ValueError(f"unknown parts {sorted(unknown)}; choose from {', '.join(PREFIXES)}")
    info = hub.find_checkpoint(os.fspath(name_or_path))
    if info is not None and info.kind == "autoencoder":
        raise _explain_autoencoder(name_or_path)
    files = locate_checkpoint(name_or_path)
    raw = read_model_config(files)
    if is_autoencoder(raw):
        raise _explain_autoencoder(name_or_path)
    config = parse_model(raw, str(files.config))
    modules = build_modules(config, find_text_encoder(files, config.conditioner.text))
    modules["autoencoder"].chunked = config.chunked
    lazy = lazy_encoder and "autoencoder" in parts
    weights = _open_weights(files, raw)
    _load_weights(weights, modules, PREFIXES, parts, device, dtype, without=(ENCODER_PREFIX,) if lazy else ())
    modules["autoencoder"].file_fingerprint = _defer_fingerprint(weights, PREFIXES["autoencoder"])
    if lazy:
        modules["autoencoder"].load_encoder = functools.partial(_read_encoder, files, raw)
    loaded: Any = {name: module if name in parts else None for name, module in modules.items()}
    sibling = files.info.sibling if files.info is not None else None
    return StableAudio3(files.name, files.path, config, **loaded, weights=weights, sibling=sibling)


def describe_checkpoint(name_or_path: str | os.PathLike[str]) -> tuple[str, ModelConfig]:
    """Read what a model is, without its weights.

    Args:
        name_or_path: As for `load_checkpoint`.

    Returns:
        Its name and architecture.

    Raises:
        CheckpointError: As `load_checkpoint`.
    """
    files = hub.locate_config(os.fspath(name_or_path))
    raw = read_model_config(files)
    if is_autoencoder(raw):
        raise _explain_autoencoder(name_or_path)
    return files.name, parse_model(raw, str(files.config))


def load_autoencoder(
    name_or_path: str | os.PathLike[str], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """Load SAME alone, from a stand-alone checkpoint or from a whole model. It does not run in chunks unless asked.

    Args:
        name_or_path: Registry name or folder.
        device: Where it is loaded.
        dtype: Dtype of its weights.

    Returns:
        The autoencoder.

    Raises:
        CheckpointError: As `load_checkpoint`.
    """
    files = locate_checkpoint(name_or_path)
    raw = read_model_config(files)
    if is_autoencoder(raw):
        config, prefix = parse_autoencoder(raw, str(files.config)), ""
        with torch.device("meta"), _SkipInit():
            modules: dict[str, Any] = {"autoencoder": Autoencoder(config)}
        prefixes: Mapping[str, str] = {"autoencoder": ""}
    else:
        model = parse_model(raw, str(files.config))
        modules = build_modules(model, find_text_encoder(files, model.conditioner.text))
        prefixes, prefix = PREFIXES, PREFIXES["autoencoder"]
    weights = _open_weights(files, raw)
    _load_weights(weights, modules, prefixes, ("autoencoder",), device, dtype)
    autoencoder: Autoencoder = modules["autoencoder"]
    autoencoder.file_fingerprint = _defer_fingerprint(weights, prefix)
    return autoencoder


class _SkipInit(TorchFunctionMode):
    """Skip `torch.nn.init`: it has no effect on the meta device, and what it imports takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _explain_autoencoder(name_or_path: str | os.PathLike[str]) -> CheckpointError:
    return CheckpointError(
        f"{name_or_path} is a stand-alone autoencoder, which cannot generate. Use a whole model, such as nano or "
        f"small-music-base."
    )


def build_modules(config: ModelConfig, source: TextEncoderSource, device: str = "meta") -> dict[str, Any]:
    """Build the three parts of a model.

    Args:
        config: The architecture.
        source: Where the text encoder is.
        device: On the meta device, parts have names and shapes only; on others they are initialized.

    Returns:
        "dit", "conditioner" and "autoencoder".
    """
    with torch.device(device), _SkipInit() if device == "meta" else contextlib.nullcontext():
        return {
            "dit": DiT(config.dit),
            "conditioner": Conditioner(config.conditioner, source),
            "autoencoder": Autoencoder(config.autoencoder),
        }


def collect_state_dict(modules: Mapping[str, nn.Module], prefixes: Mapping[str, str] = PREFIXES) -> dict[str, Tensor]:
    """Collect the tensors of the parts under the names of the released files.

    Args:
        modules: Parts by name.
        prefixes: Prefix of each part.

    Returns:
        Tensors by name.
    """
    return {
        f"{prefixes[part]}{name}": tensor
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def read_model_config(files: CheckpointFiles) -> dict[str, Any]:
    """Read a checkpoint's config in any layout.

    Args:
        files: The checkpoint.

    Returns:
        The content of its `model_config.json`, or what that would be.

    Raises:
        CheckpointError: A file is missing, damaged or of another model.
    """
    if files.is_pipeline:
        return read_pipeline_config(files.folder)
    return build_config(files.config) if files.config == files.pack else read_config_file(files.config)


def _open_weights(files: CheckpointFiles, config: Mapping[str, Any]) -> WeightFiles:
    if files.pack is not None:
        return open_packs(files.pack, find_codec_kind(config))
    return open_pipeline(files.folder) if files.is_pipeline else open_weight_file(files.weights)


def _load_weights(
    weights: WeightFiles,
    modules: Mapping[str, nn.Module],
    prefixes: Mapping[str, str],
    parts: tuple[str, ...],
    device: torch.device | str,
    dtype: torch.dtype,
    without: tuple[str, ...] = (),
) -> None:
    """Check all tensors against all modules, then read the parts asked for, but for names in `without`."""
    disable_tf32_convolutions()
    if torch.device(device).type == "cpu":
        enable_fast_fp32_matmul()
    expected = {name: tuple(tensor.shape) for name, tensor in collect_state_dict(modules, prefixes).items()}
    check_tensor_names(weights.path, weights.shapes, expected)
    for part in parts if torch.device(device).type != "meta" else ():
        _read_into(weights, prefixes[part], modules[part], device, dtype, without)


def _read_into(
    weights: WeightFiles,
    prefix: str,
    module: nn.Module,
    device: torch.device | str,
    dtype: torch.dtype,
    without: tuple[str, ...] = (),
) -> None:
    """Read the tensors of `module`, whose released names begin with `prefix`."""
    names = [name for name in (f"{prefix}{own}" for own in module.state_dict()) if not name.startswith(without)]
    state = {}
    for name, tensor in weights.iterate(names, device, dtype):
        exact = _check_rotary(weights.path, name, tensor) if name.endswith("inv_freq") else tensor
        state[name.removeprefix(prefix)] = exact
    module.load_state_dict(state, strict=not without, assign=True)
    module.requires_grad_(False).eval()


def _read_encoder(
    files: CheckpointFiles, raw: Mapping[str, Any], encoder: nn.Module, device: torch.device, dtype: torch.dtype
) -> None:
    """Read the encoder that was left out."""
    _read_into(_open_weights(files, raw), ENCODER_PREFIX, encoder, device, dtype)


def _check_rotary(path: Path, name: str, tensor: Tensor) -> Tensor:
    """Check the file's frequencies, which 16 bits round, and return the exact ones."""
    exact = compute_rotary_frequencies(tensor.device)
    if not torch.allclose(tensor.float(), exact, rtol=1e-2):
        raise CheckpointError(
            f"{path}: {name} has other rotary frequencies than Stable Audio 3. Use the released file."
        )
    return exact


def _defer_fingerprint(weights: WeightFiles, prefix: str) -> Callable[[], str]:
    return functools.partial(weights.compute_fingerprint, (prefix,), prefix)
