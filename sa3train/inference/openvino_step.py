"""The denoiser's step on OpenVINO (extra `openvino`), for CPUs.

The weights are inputs of the graph and share the memory of the model's own, which adapters, strengths and intervals
change in place, so that nothing is compiled again. The graph depends on the architecture alone and stays in the cache.
"""

import functools
import hashlib
import importlib.util
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sa3train import __version__
from sa3train.core.errors import ConfigError, LibraryError
from sa3train.core.files import get_cache_dir, replace_folder
from sa3train.core.log import get_logger
from sa3train.models.attention import Padded, force_backend
from sa3train.models.dit import DiT, PreparedConditions
from sa3train.models.dit_graph import EmbeddedStepGraph, join_conditions

logger = get_logger(__name__)

BACKENDS = ("torch", "openvino")
PRECISIONS = ("fp32", "bf16")
GRAPH, GRAPH_VERSION = "step.xml", 3
INPUTS = 6
"""Inputs before the weights."""


def check_backend(backend: str, device: torch.device, precision: str, compiled: bool) -> None:
    """Check that a backend computes what is asked for.

    Args:
        backend: What computes the denoiser's steps.
        device: The device.
        precision: What the model is loaded in.
        compiled: Whether its blocks are compiled by torch.

    Raises:
        ConfigError: It is unknown, or does not.
        LibraryError: OpenVINO is not installed.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"unknown backend={backend!r}. Choose {' or '.join(BACKENDS)}.")
    if backend == "torch":
        return
    if compiled:
        raise ConfigError("backend=openvino compiles the denoiser itself. Remove --compile (compiled=True).")
    if device.type != "cpu":
        raise ConfigError(f"backend=openvino is for CPUs, not {device.type}. Choose --device cpu or --backend torch.")
    if precision not in PRECISIONS:
        raise ConfigError(
            f"backend=openvino does not compute in {precision}. Choose --precision {' or '.join(PRECISIONS)}, or "
            f"--backend torch."
        )
    if importlib.util.find_spec("openvino") is None:
        raise LibraryError("openvino is not installed. Run: pip install 'sa3train[openvino]'")


def run_on_openvino(dit: DiT, context_length: int) -> None:
    """Compute the steps of a denoiser by OpenVINO.

    Args:
        dit: The denoiser, on the CPU, in fp32 or bf16. Its weights may change in place, and must not be replaced.
        context_length: Context tokens of a clip.
    """
    dit.predict_embedded = _OpenVINOStep(dit, context_length)  # type: ignore[method-assign]


class _OpenVINOStep:
    """Stands in for `DiT.predict_embedded` of unpacked rows; bf16 of OpenVINO would round the angles of t."""

    def __init__(self, dit: DiT, context_length: int) -> None:
        import openvino

        self._openvino = openvino
        self._memory = dit.config.memory_tokens
        precision = "bf16" if dit.dtype == torch.bfloat16 else "f32"
        hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = openvino.Core().compile_model(_ensure_graph(dit, context_length), "CPU", hints)
        self._request = compiled.create_infer_request()
        weights = [weight.detach() for weight in dit.parameters()]
        assert len(compiled.inputs) == INPUTS + len(weights), "OpenVINO dropped inputs"
        self._share(INPUTS, weights)
        self._prepared: PreparedConditions | None = None
        self._conditions: list[Tensor] = []

    def __call__(self, x_BCT: Tensor, global_SD: Tensor, prepared: PreparedConditions) -> Tensor:
        if prepared is not self._prepared:
            pattern = prepared.layout.self_pattern
            mask_BT = torch.ones(len(x_BCT), x_BCT.shape[2], dtype=torch.bool)
            if isinstance(pattern, Padded):
                mask_BT = pattern.key_mask_BM[:, self._memory :]
            self._conditions = [each.contiguous() for each in (mask_BT, *join_conditions(prepared))]
            self._share(1, self._conditions)
            self._prepared = prepared
        given = x_BCT.float().contiguous(), global_SD.detach().contiguous()
        for index, tensor in zip((0, 2), given, strict=True):
            self._share(index, [tensor])
        self._request.infer()
        return torch.from_numpy(self._request.get_output_tensor(0).data.copy()).to(x_BCT.dtype)

    def _share(self, first: int, tensors: Iterable[Tensor]) -> None:
        """Let inputs share the memory of tensors."""
        for index, tensor in enumerate(tensors, first):
            is_bf16 = tensor.dtype == torch.bfloat16
            values = (tensor.view(torch.int16) if is_bf16 else tensor).numpy()
            kind = (self._openvino.Shape(values.shape), self._openvino.Type.bf16) if is_bf16 else (True,)
            self._request.set_input_tensor(index, self._openvino.Tensor(values, *kind))


def _ensure_graph(dit: DiT, context_length: int) -> Path:
    """Ensure that the cache has the graph of an architecture."""
    import openvino

    versions = (__version__, torch.__version__, openvino.__version__)
    content = repr((dit.config, context_length, dit.dtype, versions, GRAPH_VERSION))
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    folder = get_cache_dir() / "openvino" / key
    if not (folder / GRAPH).is_file():
        logger.info("converting the denoiser for OpenVINO, once for its architecture")
        with replace_folder(folder, lambda _: True) as staged:
            openvino.save_model(_convert(dit, context_length), staged / GRAPH, compress_to_fp16=False)
    return folder / GRAPH


class _WithWeights(nn.Module):
    """A module whose weights are inputs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._call = functools.partial(torch.func.functional_call, module)

    def forward(self, inputs: tuple[Tensor, ...], weights: dict[str, Tensor]) -> Tensor:
        return self._call(weights, inputs)  # the first input must be used: OpenVINO drops that one otherwise


def _convert(dit: DiT, context_length: int) -> Any:
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    step = EmbeddedStepGraph(dit).eval()
    weights = dict(step.named_parameters())
    sizes = tuple(step.list_dynamic_sizes().values())
    with torch.no_grad(), force_backend("reference"):
        program = torch.export.export(
            _WithWeights(step),
            (tuple(step.make_example(context_length).values()), weights),
            dynamic_shapes=(sizes, dict.fromkeys(weights)),
        )
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)  # OpenVINO logs a traceback for every decomposition that this torch lacks
        try:
            decoder = TorchFXPythonDecoder.from_exported_program(program, dynamic_shapes=False)
        finally:
            logging.disable(disabled)
    frontend = FrontEndManager().load_by_framework("pytorch")
    return frontend.convert(frontend.load(decoder))
