"""Run exported graphs on fixed noise and compare them with the modules that they were made of."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa3train.diffusion.samplers import SAMPLERS
from sa3train.diffusion.schedule import build_schedule
from sa3train.export.graphs import Graph
from sa3train.models.attention import force_backend
from sa3train.models.checkpoint import StableAudio3

FRAMES, PADDED, STEPS = 42, 5, 8
TEXT_DTYPE = "text encoder as sa3-generate runs it"
"""A figure of the check that is no error: what the text encoder's own dtype changes in the latents."""

Call = Callable[[str, Mapping[str, Tensor]], Sequence[Tensor]]


class GraphCheck:
    """What the exact path makes of fixed noise. It outlives the model, so that memory holds one of the two at a time.

    Args:
        model: The model with its adapters applied.
        graphs: Its graphs, used up.
    """

    def __init__(self, model: StableAudio3, graphs: Mapping[str, Graph]) -> None:
        rng = torch.Generator().manual_seed(1)
        self._inputs = {name: dict(graph.inputs) for name, graph in graphs.items()}
        self._start_1CT = torch.randn(1, model.latent_channels, FRAMES, generator=rng)
        self._local_1CT = torch.zeros(1, model.config.dit.local_width, FRAMES)

        def call(name: str, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
            found = graphs[name].module(*inputs.values())
            return (found,) if isinstance(found, Tensor) else found

        with torch.no_grad(), force_backend("reference"):
            self._outputs = {name: call(name, inputs) for name, inputs in self._inputs.items()}
            self._latents, self._steps = self._walk(call)
            conditions: Any = graphs["conditions"].module
            conditions = getattr(conditions, "module", conditions)
            conditions.encoder = model.conditioner.text_encoder.model(torch.device("cpu"))
            self._text = _measure_error(self._walk(call)[0], self._latents)

    def compare(self, folder: Path) -> dict[str, float]:
        """Compare the files of the graphs.

        Args:
            folder: Where they are.

        Returns:
            Largest relative error of each graph, of the denoised latents at each step, and of all steps together; and
            how far the exact latents are from those of a text encoder in its file's dtype.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_prepacking", "1")  # weights stay mapped, not copied

        @functools.lru_cache(maxsize=1)
        def load(name: str) -> Any:
            return onnxruntime.InferenceSession(folder / f"{name}.onnx", options)

        def call(name: str, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
            found = load(name).run(None, {key: tensor.contiguous().numpy() for key, tensor in inputs.items()})
            return [torch.from_numpy(each) for each in found]

        errors = {
            name: max(map(_measure_error, call(name, inputs), self._outputs[name]))
            for name, inputs in self._inputs.items()
        }
        latents, steps = self._walk(call)
        errors |= {
            f"step {at + 1}": _measure_error(*pair) for at, pair in enumerate(zip(steps, self._steps, strict=True))
        }
        return errors | {"latents": _measure_error(latents, self._latents), TEXT_DTYPE: self._text}

    def _walk(self, call: Call) -> tuple[Tensor, list[Tensor]]:
        """Walk all levels of noise, at another length than the one that was traced."""
        mask_1T = torch.arange(FRAMES)[None] < FRAMES - PADDED
        prompt = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool), torch.tensor([3.0])

        def run(name: str, inputs: Iterable[Tensor]) -> Sequence[Tensor]:
            given = dict(zip(self._inputs[name], inputs, strict=False))  # what follows are adapters
            return call(name, self._inputs[name] | given)

        prepared = run("prepare", (*run("conditions", prompt), self._local_1CT))
        seen: list[Tensor] = []
        latents_1CT = SAMPLERS["euler"].sample(
            lambda x, t: run("step", (x, mask_1T, *prepared, t[None]))[0],
            self._start_1CT,
            build_schedule(STEPS),
            callback=lambda step, total, sigma, denoised: seen.append(denoised),
        )
        return latents_1CT, seen


def _measure_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm().clamp(min=1e-12))
