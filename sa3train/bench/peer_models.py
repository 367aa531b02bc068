"""Denoisers and decoders of other programs, loaded with the weights of one of our models.

Shapes: B items, C latent channels, T latent frames.
"""

import functools
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.bench.adapters import RANK
from sa3train.bench.checkpoints import load_random_model, make_random_checkpoint
from sa3train.bench.figures import Options
from sa3train.core.dtypes import get_dtype
from sa3train.inference.openvino_step import check_backend, run_on_openvino
from sa3train.models.checkpoint import collect_state_dict
from sa3train.models.diffusers_layout import TRANSFORMER, add_tensor, build_component_configs
from sa3train.models.parse import complete_config

Conditions = Mapping[str, Tensor]
"""`cross_attn_cond_BLD`, `global_cond_BD` and `local_add_cond_BCT`, as `DiT.forward` takes them."""


@dataclass(frozen=True)
class Denoiser:
    """A denoiser of one program.

    Attributes:
        predict: Velocity (B, C, T) of latents and noise levels (B,).
        parameters: What is trained; nothing without an adapter.
        weight_bytes: Bytes of all its weights.
    """

    predict: Callable[[Tensor, Tensor], Tensor]
    parameters: list[nn.Parameter]
    weight_bytes: int


@dataclass(frozen=True)
class Peer:
    """Another program.

    Attributes:
        name: Its name in the table.
        imported: Modules that it needs.
        packages: Packages whose versions are stated.
        load: Loads its denoiser: options, architecture, conditions and adapter type (None: no adapter).
        trains: Whether it trains adapters.
    """

    name: str
    imported: tuple[str, ...]
    packages: tuple[str, ...]
    load: Callable[[Options, str, Conditions, str | None], Denoiser]
    trains: bool = True

    def name_versions(self) -> str:
        """Name the packages with their versions.

        Returns:
            Such as "diffusers 0.42.1, peft 0.21.2". A clone on PYTHONPATH has no version.
        """
        found = []
        for package in self.packages:
            try:
                found.append(f"{package} {importlib.metadata.version(package)}")
            except importlib.metadata.PackageNotFoundError:
                found.append(f"{package} from a clone")
        return ", ".join(found)


def load_ours(options: Options, arch: str, conditions: Conditions, adapter_type: str | None) -> Denoiser:
    """Load our denoiser.

    Args:
        options: `device` and `dtype`.
        arch: Architecture.
        conditions: Conditions of every prediction.
        adapter_type: Type of a fresh adapter on every layer; None for none.

    Returns:
        The denoiser.
    """
    model = load_random_model(arch, options, "dit", "conditioner")
    parameters: list[nn.Parameter] = []
    if adapter_type is not None:
        parameters = list(inject(model.get_adapter_root(), AdapterSpec(adapter_type, rank=RANK)).parameters())
    return Denoiser(functools.partial(model.dit, **conditions), parameters, _count_bytes(model.dit))


def load_diffusers(options: Options, arch: str, conditions: Conditions, adapter_type: str | None) -> Denoiser:
    """Load the transformer of diffusers; PEFT injects its adapters into all linear layers and convolutions.

    Args:
        options: `device` and `dtype`.
        arch: Architecture.
        conditions: Conditions of every prediction.
        adapter_type: "lora" or "dora-rows"; None for none.

    Returns:
        The denoiser, with adapters in fp32 over the base in `dtype`.
    """
    import diffusers
    import peft

    ours = load_random_model(arch, options, "dit", "conditioner")
    tensors: dict[str, dict[str, Tensor]] = {TRANSFORMER: {}}
    for name, tensor in collect_state_dict({"dit": ours.dit, "conditioner": ours.conditioner}).items():
        add_tensor(tensors, name, tensor)
    settings = build_component_configs(ours.config)[TRANSFORMER]
    transformer = diffusers.StableAudio3DiTModel.from_config(settings)
    nn.Module.to(transformer, options.device, get_dtype(options.dtype))  # its own `to` warns of lists that are empty
    transformer.load_state_dict(tensors[TRANSFORMER])
    transformer.eval().requires_grad_(False)
    parameters: list[nn.Parameter] = []
    if adapter_type is not None:
        layers = [name for name, each in transformer.named_modules() if isinstance(each, nn.Linear | nn.Conv1d)]
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers, use_dora=adapter_type == "dora-rows")
        peft.inject_adapter_in_model(config, transformer)
        parameters = [each for each in transformer.parameters() if each.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.data.float()

    def predict(x_BCT: Tensor, t_B: Tensor) -> Tensor:
        velocity_BCT: Tensor = transformer(
            x_BCT,
            t_B,
            encoder_hidden_states=conditions["cross_attn_cond_BLD"],
            global_hidden_states=conditions["global_cond_BD"],
            local_add_cond=conditions["local_add_cond_BCT"],
        ).sample
        return velocity_BCT

    return Denoiser(predict, parameters, _count_bytes(transformer))


def load_official(options: Options, arch: str, conditions: Conditions, adapter_type: str | None) -> Denoiser:
    """Load the official implementation's denoiser, with the adapters of its trainer.

    Args:
        options: `device` and `dtype`.
        arch: Architecture.
        conditions: Conditions of every prediction.
        adapter_type: One of its adapter types; None for none.

    Returns:
        The denoiser, with adapters in fp32 over the base in `dtype`.
    """
    from stable_audio_3.models import lora
    from stable_audio_3.models.diffusion import DiTWrapper

    ours = load_random_model(arch, options, "dit")
    settings = _read_config(arch)["model"]["diffusion"]
    network = DiTWrapper(diffusion_objective=settings["diffusion_objective"], **settings["config"])
    weights = collect_state_dict({"dit": ours.dit})
    network.load_state_dict({name.removeprefix("model."): tensor.float() for name, tensor in weights.items()})
    network = network.to(options.device).eval().requires_grad_(False)
    parameters: list[nn.Parameter] = []
    if adapter_type is not None:
        make = {
            nn.Linear: lora.LoRAParametrization.from_linear,
            nn.Conv1d: lora.LoRAParametrization.from_conv1d,
        }
        settings = {"rank": RANK, "lora_alpha": RANK, "adapter_type": adapter_type}
        lora.add_lora(network, {kind: {"weight": functools.partial(of, **settings)} for kind, of in make.items()})
        parameters = list(lora.get_lora_params(network))
    if options.dtype != "fp32":
        lora.cast_base_to_precision(network, options.dtype)

    def predict(x_BCT: Tensor, t_B: Tensor) -> Tensor:
        velocity_BCT: Tensor = network(
            x_BCT,
            t_B,
            cross_attn_cond=conditions["cross_attn_cond_BLD"],
            global_cond=conditions["global_cond_BD"],
            local_add_cond=conditions["local_add_cond_BCT"],
        )
        return velocity_BCT

    return Denoiser(predict, parameters, _count_bytes(network))


def load_openvino(options: Options, arch: str, conditions: Conditions, adapter_type: str | None) -> Denoiser:
    """Load our denoiser with OpenVINO as its backend.

    Args:
        options: `device` and `dtype`.
        arch: Architecture.
        conditions: Conditions of every prediction.
        adapter_type: None, since it trains none.

    Returns:
        The denoiser.

    Raises:
        SA3Error: OpenVINO does not compute on this device or in this dtype.
    """
    check_backend("openvino", torch.device(options.device), options.dtype, compiled=False)
    dit = load_random_model(arch, options, "dit").dit
    run_on_openvino(dit, conditions["cross_attn_cond_BLD"].shape[1])
    prepare = functools.cache(lambda shape: dit.prepare(shape, **conditions))
    return Denoiser(lambda x_BCT, t_B: dit.predict_velocity(x_BCT, t_B, prepare(x_BCT.shape)), [], _count_bytes(dit))


def load_official_decoder(options: Options, arch: str, weights: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Load the official implementation's autoencoder.

    Args:
        options: `device` and `dtype`.
        arch: Architecture.
        weights: Tensors of our autoencoder.

    Returns:
        Decoding of latents (B, C, T) as its generations use it, in chunks.
    """
    from stable_audio_3.factory import create_autoencoder_from_config

    config = _read_config(arch)
    autoencoder = create_autoencoder_from_config(config["model"], config["sample_rate"])
    autoencoder.load_state_dict(dict(weights))
    autoencoder = autoencoder.to(options.device, get_dtype(options.dtype)).eval()
    return functools.partial(autoencoder.decode_audio, chunked=True)


def _read_config(arch: str) -> dict[str, Any]:
    """Read a model's settings with all that the official implementation wants to see."""
    file = make_random_checkpoint(arch) / "model_config.json"
    return complete_config(json.loads(file.read_text(encoding="utf-8")), str(file))


def _count_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


PEERS = (
    Peer("diffusers", ("diffusers", "peft"), ("diffusers", "peft"), load_diffusers),
    Peer("OpenVINO", ("openvino",), ("openvino",), load_openvino, trains=False),
    Peer("official", ("stable_audio_3.factory",), ("stable-audio-3",), load_official),
)
