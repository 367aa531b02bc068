"""Other programs on the same weights, in turn with ours: diffusers, PEFT on it, OpenVINO, the official implementation.

diffusers, peft and openvino are packages (`pip install "sa3train[peers,openvino]"`). The official implementation is
none: it is measured where `stable_audio_3` can be imported, with a clone of its repository on PYTHONPATH and `einops`
and `einops-exts` installed. A peer that is not installed is a row that says so. Each row states how far the outputs are
apart; the official denoiser rounds the noise level to 16 bits before its Fourier features, of which random weights
make much.

Shapes: B items, C latent channels, T latent frames.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sa3train.bench.adapters import FRAMES
from sa3train.bench.checkpoints import load_random_model
from sa3train.bench.figures import Figure, Options
from sa3train.bench.generate import make_inputs
from sa3train.bench.measure import Timings, measure_peak_allocation, time_interleaved, use_threads
from sa3train.bench.peer_models import PEERS, Denoiser, Peer, load_official_decoder, load_ours
from sa3train.core.dtypes import get_dtype
from sa3train.core.errors import SA3Error
from sa3train.diffusion.samplers import SAMPLERS
from sa3train.diffusion.schedule import build_schedule

DENOISER_TARGETS = {"diffusers": 1.6, "OpenVINO": 1.1}
STEP_TARGETS: dict[str, dict[str | None, float]] = {
    "diffusers": {None: 1.4, "lora": 1.3, "dora-rows": 2.5},
    "official": {"dora-rows": 4.0},
}
"""A peer's time over ours to reach, by adapter type; None is the frozen pass."""
DECODE_TARGET, MEMORY_TARGET = 1.5, 0.75


def run(options: Options) -> list[Figure]:
    """Measure generation, training steps and decoding of each peer that is installed.

    Args:
        options: `arch` (default small), `seconds` of generations (default 30), `steps`.

    Returns:
        Times of each peer over ours, and our memory over its own.
    """
    figures = []
    with use_threads(options.threads):
        for peer in PEERS:
            try:
                for module in peer.imported:
                    importlib.import_module(module)
                figures += _measure_peer(options, peer)
            except (ImportError, SA3Error) as error:
                figures.append(Figure(f"{peer.name} / ours", None, "", note=f"cannot be used: {error}"))
    return figures


def _measure_peer(options: Options, peer: Peer) -> list[Figure]:
    figures = [_measure_denoiser(options, peer)]
    for adapter_type in (None, "lora", "dora-rows") if peer.trains else ():
        figures += _measure_step(options, peer, adapter_type)
    if peer.name == "official":
        figures.append(_measure_decoding(options, peer))
    return figures


def _compare(
    timings: Timings, peer: Peer, what: str, outputs: Mapping[str, Tensor], target: float | None, options: Options
) -> Figure:
    """Make the figure of a peer's time over ours; targets hold for the small architecture in bf16 on a CPU."""
    theirs, ours = outputs["peer"].float(), outputs["ours"].float()
    apart = ((theirs - ours).norm() / theirs.norm()).item()
    figure = timings.compare(f"{peer.name} / ours: {what}", "peer", "ours", target if _has_targets(options) else None)
    return replace(figure, sense=">=", note=f"{peer.name_versions()}; outputs {apart:.1e} apart; {figure.note}")


def _has_targets(options: Options) -> bool:
    return options.arch in (None, "small") and not options.is_cuda and options.dtype == "bf16"


def _draw_conditions(options: Options, frames: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw latents and the conditions that every program takes, in the dtype of the weights."""
    model = load_random_model(options.arch or "small", options, "dit", "conditioner")
    config, generator = model.config.dit, torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    conditions = {
        "cross_attn_cond_BLD": draw(1, model.conditioner.max_length + 1, config.context_width),
        "global_cond_BD": draw(1, config.global_width),
        "local_add_cond_BCT": torch.zeros(1, config.local_width, frames),
    }
    place, dtype = options.device, get_dtype(options.dtype)
    latents_BCT = draw(1, config.latent_width, frames).to(place, dtype)
    return latents_BCT, {name: tensor.to(place, dtype) for name, tensor in conditions.items()}


def _measure_denoiser(options: Options, peer: Peer) -> Figure:
    """Measure the sampling loop; ours computes what does not change from step to step once."""
    arch, seconds = options.arch or "small", options.seconds or 30.0
    model = load_random_model(arch, options, "dit", "conditioner")
    frames = make_inputs(model, seconds, options.device)[0].shape[-1]
    latents_BCT, conditions = _draw_conditions(options, frames)
    with torch.no_grad():
        theirs = peer.load(options, arch, conditions, None)

        def sample(predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            def velocity(x_BCT: Tensor, t: Tensor) -> Tensor:
                return predict(x_BCT, t.to(x_BCT.device).expand(x_BCT.shape[0]))

            return SAMPLERS["euler"].sample(velocity, latents_BCT, build_schedule(options.steps))

        def sample_ours() -> Tensor:
            prepared = model.dit.prepare(latents_BCT.shape, **conditions)
            return sample(lambda x_BCT, t_B: model.dit.predict_velocity(x_BCT, t_B, prepared))

        tasks = {"peer": lambda: sample(theirs.predict), "ours": sample_ours}
        outputs = {name: task() for name, task in tasks.items()}
        timings = time_interleaved(tasks, options.repeats, options.device, warm_up=0)
    what = f"{arch} denoiser, {seconds:g} s, {options.steps} steps, {options.dtype}"
    return _compare(timings, peer, what, outputs, DENOISER_TARGETS.get(peer.name), options)


def _measure_step(options: Options, peer: Peer, adapter_type: str | None) -> list[Figure]:
    """Measure forward and backward: to the adapter's parameters, or to the input where nothing is trained."""
    arch = options.arch or "small"
    x_BCT, conditions = _draw_conditions(options, FRAMES)
    denoisers = {
        "peer": peer.load(options, arch, conditions, adapter_type),
        "ours": load_ours(options, arch, conditions, adapter_type),
    }
    steps = {name: functools.partial(_run_step, denoiser, x_BCT) for name, denoiser in denoisers.items()}
    memory = {
        name: denoisers[name].weight_bytes + measure_peak_allocation(step, options.device)
        for name, step in steps.items()
    }
    with torch.no_grad():
        t_B = torch.full((1,), 0.5, device=options.device)
        outputs = {name: denoiser.predict(x_BCT, t_B) for name, denoiser in denoisers.items()}
    timings = time_interleaved(steps, options.repeats, options.device)
    what = f"{arch} {adapter_type or 'frozen'} step, {FRAMES} frames, {options.dtype}"
    ratio = memory["ours"] / memory["peer"]
    note = f"{memory['ours'] / 1e9:.2f} GB against {memory['peer'] / 1e9:.2f} GB, weights included"
    limit = MEMORY_TARGET if peer.name == "diffusers" and adapter_type and _has_targets(options) else None
    return [
        _compare(timings, peer, what, outputs, STEP_TARGETS[peer.name].get(adapter_type), options),
        Figure(f"ours / {peer.name}: memory of {arch} {adapter_type or 'frozen'} step", ratio, "×", limit, note=note),
    ]


def _run_step(denoiser: Denoiser, x_BCT: Tensor) -> None:
    for parameter in denoiser.parameters:
        parameter.grad = None
    x_BCT = x_BCT if denoiser.parameters else x_BCT.clone().requires_grad_()
    denoiser.predict(x_BCT, torch.full((1,), 0.5, device=x_BCT.device)).float().square().mean().backward()


def _measure_decoding(options: Options, peer: Peer) -> Figure:
    """Measure decoding as generations do it. diffusers has no autoencoder of SAME-S's kind, which attends in chunks."""
    arch, seconds = options.arch or "small", options.seconds or 30.0
    ours = load_random_model(arch, options, "autoencoder").autoencoder
    decode = load_official_decoder(options, arch, ours.state_dict())
    frames = -(-int(seconds * ours.sample_rate) // ours.downsampling_ratio)
    latents_BCT = torch.randn(1, ours.latent_channels, frames, generator=torch.Generator().manual_seed(0))
    latents_BCT = latents_BCT.to(options.device, get_dtype(options.dtype))
    with torch.inference_mode():
        tasks = {"peer": lambda: decode(latents_BCT), "ours": lambda: ours.decode(latents_BCT)}
        outputs = {name: task() for name, task in tasks.items()}
        timings = time_interleaved(tasks, options.repeats, options.device, warm_up=0)
    what = f"{arch} decode of {seconds:g} s, {options.dtype}"
    return _compare(timings, peer, what, outputs, DECODE_TARGET, options)
