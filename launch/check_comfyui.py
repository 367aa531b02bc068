"""Play the files that we write with ComfyUI's own code, and files of its types with ours, and compare the weights.

Run as `python launch/check_comfyui.py FOLDER`, where FOLDER is a checkout of ComfyUI whose requirements are
installed. Prints the largest error by adapter type and strength, and fails above 1e-5 of the change.
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TESTS = Path(__file__).resolve().parents[1] / "tests"
STRENGTHS = (0.5, 1.0, 1.3, 0.0, -0.7)
LIMIT = 1e-5


def make_products(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Make a LoHa, a LoKr and an OFT on every layer, and a LoHa with a dora_scale."""
    rng = torch.Generator().manual_seed(0)
    made: dict[str, dict[str, Tensor]] = {name: {} for name in ("loha", "lokr", "oft", "loha with dora_scale")}
    for path, W in weights.items():
        rows, columns = W.flatten(1).shape
        key = f"diffusion_model.{path.removeprefix('model.')}"

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng) * 0.1

        loha = {f"hada_w{i}_{ab}": draw(*shape) for i in "12" for ab, shape in (("a", (rows, 2)), ("b", (2, columns)))}
        loha["alpha"] = torch.tensor(3.0)
        two = 2 if rows % 2 == columns % 2 == 0 else 1
        lokr = {"lokr_w1": draw(two, two), "lokr_w2_a": draw(rows // two, 2), "lokr_w2_b": draw(2, columns // two)}
        oft = {"oft_blocks": draw(two, rows // two, rows // two), "alpha": torch.tensor(0.5)}
        scale = torch.linalg.vector_norm(W.flatten(1), dim=1).reshape(-1, *[1] * (W.ndim - 1)) * 1.1
        for name, layer in zip(made, (loha, lokr, oft, {**loha, "dora_scale": scale}), strict=True):
            made[name] |= {f"{key}.{end}": tensor for end, tensor in layer.items()}
    return made


def play_in_comfyui(comfy_lora: Any, file: Path, weights: dict[str, Tensor], strength: float) -> dict[str, Tensor]:
    """Play a file with ComfyUI's code from its tensors to the weights."""
    stored = {f"diffusion_{path}.weight": W for path, W in weights.items()}
    model = SimpleNamespace(state_dict=lambda: stored, model_config=SimpleNamespace(unet_config={}))
    patches = comfy_lora.load_lora(load_file(file), comfy_lora.model_lora_keys_unet(model, {}))
    return {
        key.removeprefix("diffusion_").removesuffix(".weight"): comfy_lora.calculate_weight(
            [(strength, patch, 1.0, None, None)], stored[key].clone(), key
        )
        for key, patch in patches.items()
        if key.endswith(".weight")
    }


def compare(comfy_lora: Any, file: Path, original: Any, weights: dict[str, Tensor]) -> list[float]:
    """Compare, and return the error over all layers by strength, relative to the change at strength 1.

    ComfyUI squares the strength of an OFT.
    """
    from sa3train.adapters.apply.layer_weight import get_layer_adapter

    ours = {path: get_layer_adapter(original, path, weights[path]).weight(weights[path]) for path in weights}
    change = sum(float((ours[path] - weights[path]).square().sum()) for path in weights)
    errors = []
    for strength in STRENGTHS:
        theirs = play_in_comfyui(comfy_lora, file, weights, strength)
        assert theirs.keys() == weights.keys(), "ComfyUI leaves layers out"
        strength = strength**2 if file.stem == "oft" else strength
        apart = sum(
            float((torch.lerp(weights[path].double(), ours[path].double(), strength) - theirs[path]).square().sum())
            for path in weights
        )
        errors.append((apart / change) ** 0.5)
    return errors


def main(folder: str) -> int:
    """Compare every type on the golden models."""
    sys.path[:0] = [folder, str(TESTS)]
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.lora
    from comfyui_version import __version__

    from helpers.golden import PLAIN
    from sa3train.adapters.formats.io import load_adapter
    from sa3train.adapters.tools import convert_adapter
    from sa3train.adapters.tools.base_weights import get_weights
    from sa3train.models.checkpoint import load_checkpoint

    worst = 0.0
    print(f"ComfyUI {__version__}; error at strengths {STRENGTHS}, of the change at strength 1")
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        target = Path(temporary) / "comfy.safetensors"
        for which in ("plain", "diff"):
            model = load_checkpoint(PLAIN.parent / which, device="meta", parts=("dit", "conditioner"))
            weights = {path: W for path, W in get_weights(model).items() if path.startswith("model.")}
            sources = {path.stem: path for path in sorted((PLAIN.parent / which / "adapters").glob("*.safetensors"))}
            for name, tensors in make_products(weights).items():
                sources[name] = Path(temporary) / f"{name}.safetensors"
                save_file(tensors, sources[name])
            for name, source in sources.items():
                original = load_adapter(source)
                mine = {path: weights[path] for path in original.tensors if path in weights}
                if source.parent != target.parent:  # files of ComfyUI's types are played as they are
                    convert_adapter(source, target, "comfy", model, dtype="fp32", overwrite=True)
                    source = target
                errors = compare(comfy.lora, source, original, mine)
                worst = max(worst, *errors)
                print(f"{which:6} {name:22}", " ".join(f"{error:8.1e}" for error in errors), flush=True)
    return int(worst > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
