"""Run the released MLX code on packs of our golden models, and play our adapter files with its loader.

Run as `python launch/check_mlx.py FOLDER`, where FOLDER is `optimized/mlx` of the released project with its adapter
loader (`models/defs/lora_merge.py`), and `mlx` is installed (`mlx[cpu]` on Linux). Prints the largest differences, and
fails above 1e-4, or where an adapter's layer is left out. `--record` writes what the tests compare with: names and
shapes, latents and audio of the codecs, tokens and hidden states of the text encoder.
"""

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

TESTS = Path(__file__).resolve().parents[1] / "tests"
LIMIT = 1e-4
PROMPTS = [
    "A lofi house loop  with\n\nöß 174 BPM", "   lead", "trail  ", "Amen break, \U0001f941 drums",
    "<mask> in text", "tab\there\nnew", "An ambient pad   with training and sampling, A minor",
]  # fmt: skip


def set_sizes(module: Any, **sizes: int) -> None:
    """Give a module of the MLX code, which has the released sizes, those of a small model."""
    for name, value in sizes.items():
        assert hasattr(module, name), f"{module.__name__} has no {name}"
        setattr(module, name, value)


def list_arrays(module: Any) -> dict[str, list[int]]:
    """List the arrays that a module of the MLX code reads."""
    from mlx.utils import tree_flatten

    return {name: list(array.shape) for name, array in tree_flatten(module.parameters()) if "freqs" not in name}


def load_dit(kind: str, pack: Path, frames: int) -> Any:
    """Load a golden DiT with the MLX code in fp32."""
    import mlx.core as mx

    code = importlib.import_module(f"models.defs.dit_mlx{'_medium' if kind == 'diff' else ''}")
    arrays = np.load(pack)
    layers = sum(name.endswith("to_qkv.weight") and "self_attn" in name for name in arrays.files)
    width, latents = arrays["transformer.project_in.weight"].shape
    inner = arrays["transformer.layers.0.ff.ff.2.weight"].shape[1]
    set_sizes(
        code, IO_CHANNELS=latents, EMBED_DIM=width, DEPTH=layers, NUM_HEADS=width // 64, LOCAL_ADD_COND_DIM=latents + 1,
        FF_INNER=inner, NUM_MEMORY_TOKENS=arrays["transformer.memory_tokens"].shape[0],
    )  # fmt: skip
    return code.load_dit(str(pack), T_lat=frames, dtype=mx.float32)


def check_dit(kind: str, pack: Path, found: dict[str, Any]) -> float:
    """Compare velocities with the recorded ones of the released torch code."""
    import mlx.core as mx

    from helpers.golden import GoldenSet

    golden, worst = GoldenSet(f"{kind}/cases"), 0.0
    for case in golden.names("dit.forward"):
        tensors = {name: tensor.float().numpy() for name, tensor in golden.tensors(case).items()}
        model = load_dit(kind, pack, tensors["x"].shape[2])
        found[f"dit_{kind}"] = list_arrays(model)
        arrays = [mx.array(tensors[name]) for name in ("x", "t", "cross_attn_cond", "global_cond")]
        local = mx.array(tensors["local_add_cond"].transpose(0, 2, 1))
        velocity = np.array(model(*arrays, local_add_cond=local))
        worst = max(worst, float(np.abs(velocity - tensors["velocity"]).max()))
    return worst


def load_side(letter: str, side: str, file: Path) -> tuple[Any, dict[str, list[int]]]:
    """Load a side of a golden SAME with the MLX code in fp32; returns it and its arrays."""
    import mlx.core as mx

    arrays = np.load(file)
    width = arrays["new_tokens"].shape[-1]
    layers = sum(name.endswith("to_qkv.weight") for name in arrays.files)
    latents = arrays["project_in.weight"].shape[1] if side == "decoder" else arrays["project_out.weight"].shape[0]
    blocks = 6 if letter == "s" else layers
    for part in ("decoder", "encoder"):
        code = importlib.import_module(f"models.defs.same_{letter}_{part}")
        set_sizes(code, DIM=width, NUM_HEADS=width // 64, FF_INNER=3 * width, LATENT_DIM=latents, NUM_BLOCKS=blocks)
        if letter == "l" and part == "decoder":
            set_sizes(code, SIN_START_BLOCK=1)
        if part == side:
            loader = code
    model = loader.load_model(str(file), dtype=mx.float32)
    beyond = tuple(f"blocks.{index}." for index in range(layers, blocks))
    listed = {name: shape for name, shape in list_arrays(model).items() if not name.startswith(beyond)}
    if letter == "s":  # its code counts six blocks: two of them are ours, the others leave x as it is
        model.blocks = [model.blocks[0], pass_on, pass_on, model.blocks[1], pass_on, pass_on]
    return model, listed


def pass_on(x: Any) -> Any:
    """Stand for a block that is not there."""
    return x


def check_codec(kind: str, letter: str, folder: Path, found: dict[str, Any], outputs: dict[str, np.ndarray]) -> float:
    """Compare latents and audio with the recorded ones of the released torch code; `outputs` gets a case of each."""
    import mlx.core as mx

    from helpers.golden import GoldenSet
    from helpers.mlx_packs import RECORDED_CASES, thin_out
    from sa3train.models.autoencoder import patchify

    golden, worst = GoldenSet(f"{kind}/cases"), 0.0
    for side in ("encoder", "decoder"):
        file = folder / f"same_{letter}_{side}_f32.npz"
        model, found[f"same_{letter}_{side}"] = load_side(letter, side, file)
        for case in golden.names("same.encode" if side == "encoder" else "same.decode"):
            tensors = golden.tensors(case)
            frames = tensors["latents"].shape[2]
            if "noisy" in case or "chunked" in case or (letter == "s" and frames % 2):
                continue
            if side == "encoder":
                if tensors["audio"].shape[2] != frames * 4096:
                    continue
                output = model(mx.array(patchify(tensors["audio"], 256).mT.numpy()))
                wanted = tensors["latents"]
            else:
                output = model(mx.array(tensors["latents"].numpy()))
                wanted = patchify(tensors["audio"], 256).mT
            worst = max(worst, float(np.abs(np.array(output) - wanted.numpy()).max()))
            if case == RECORDED_CASES[side]:
                outputs[f"same_{letter}_{side}"] = thin_out(np.array(output))
    return worst


def check_text(folder: Path) -> tuple[float, dict[str, Any]]:
    """Compare tokens and hidden states with ours."""
    from helpers.mlx_packs import make_text, save_arrays
    from sa3train.models.conditioners import TextEncoder
    from sa3train.models.text_source import TextEncoderSource

    pack = folder / "t5gemma_f16.npz"
    save_arrays(pack, make_text())
    theirs = importlib.import_module("models.defs.t5gemma_mlx").T5Gemma.from_npz(str(pack))
    hidden, mask = (np.array(each).astype(np.float32) for each in theirs.encode(PROMPTS, max_len=64))
    ours = TextEncoder(TextEncoderSource((), (), pack=pack), 64)(PROMPTS, torch.device("cpu"))
    length = ours.mask_BL.shape[1]
    assert np.array_equal(ours.mask_BL.sum(1).numpy(), mask.sum(1)), "tokens differ"
    real = mask[:, :length, None] > 0
    apart = np.abs(np.where(real, hidden[:, :length] - ours.hidden_BLD.float().numpy(), 0)).max()
    tokens = [theirs.tokenizer.Encode(prompt) for prompt in PROMPTS]
    return float(apart), {"prompts": PROMPTS, "tokens": tokens, "hidden": hidden[:, :length]}


def draw_adapter(adapter_type: str, weights: dict[str, torch.Tensor], rng: torch.Generator) -> Any:
    """Draw an adapter of rank 4 of all layers, which changes each weight by about a tenth."""
    from sa3train.adapters.adapter import Adapter
    from sa3train.adapters.spec import KINDS, AdapterSpec

    tensors = {}
    for path, weight in weights.items():
        W = weight.flatten(1)
        shapes = KINDS[adapter_type].shapes(*W.shape, 4)
        tensors[path] = {name: 0.1 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}
        for name, tensor in tensors[path].items():
            if name.startswith("magnitude"):
                by_row = name == "magnitude_r" or (name == "magnitude" and KINDS[adapter_type].rows)
                tensor.add_(1).mul_(W.norm(dim=1 if by_row else 0))
    return Adapter(AdapterSpec(adapter_type, rank=4, alpha=6), tensors, {"base_model": "golden"}, adapter_type)


def check_adapters(kind: str, folder: Path) -> None:
    """Play native files that we wrote with MLX's loader on a pack, and compare with ours on the weights in fp32."""
    import mlx.core as mx

    from helpers.golden import GOLDEN
    from helpers.mlx_packs import write_packs
    from sa3train.adapters.adapter import get_checkpoint_name
    from sa3train.adapters.apply.layer_weight import get_layer_adapter
    from sa3train.adapters.formats.io import load_adapter, save_adapter
    from sa3train.adapters.layer_filter import find_adaptable_layers
    from sa3train.adapters.spec import KINDS
    from sa3train.models.checkpoint import load_checkpoint
    from sa3train.models.mlx_layout import convert_dit_name

    code = importlib.import_module("models.defs.lora_merge")
    rng = torch.Generator().manual_seed(0)
    root = load_checkpoint(GOLDEN / kind, parts=("dit", "conditioner")).get_adapter_root()
    layers = {path: layer.weight.float() for path, layer in find_adaptable_layers(root).items()}
    state = {name: tensor.float() for name, tensor in load_file(GOLDEN / kind / "model.safetensors").items()}
    for tensor in state.values():  # golden weights are in bf16: give them the digits that fp16 rounds
        tensor.mul_(1 + 2**-9 * torch.randn(tensor.shape, generator=rng))
    pack = write_packs(kind, folder, state)
    for adapter_type in KINDS:
        file = folder / f"{adapter_type}.safetensors"
        save_adapter(file, draw_adapter(adapter_type, layers, rng))
        adapter, weights = load_adapter(file), dict(mx.load(str(pack)))
        report = code.merge_loras_into_weights(weights, [str(file)])
        assert (report["merged"], report["skipped"]) == (len(layers), []), "layers are left out"
        errors = []
        for rounded in (True, False):
            apart = change = 0.0
            for path in adapter.tensors:
                name = f"{get_checkpoint_name(path)}.weight"
                W = state[name].half().float() if rounded else state[name]
                ours = get_layer_adapter(adapter, path, W).weight(W)
                merged = torch.from_numpy(np.array(weights[convert_dit_name(name)], dtype=np.float32))
                merged = merged.mT if merged.ndim == 3 else merged
                base = state[name].half().float()
                apart += float(((merged - base) - (ours - W)).square().sum())
                change += float((ours - W).square().sum())
            errors.append((apart / change) ** 0.5)
        print(
            f"{kind:6} {adapter_type:14} {report['merged']} layers, 0 skipped; error of the change: "
            f"{errors[0]:.1e} on the pack, {errors[1]:.1e} between the pack and the weights in fp32",
            flush=True,
        )
        assert errors[0] < LIMIT, "MLX plays another adapter"


def main(folder: str, record: bool) -> int:
    """Compare all of them."""
    sys.path[:0] = [folder, str(TESTS)]
    import mlx.core as mx

    from helpers.mlx_packs import CODECS, RECORDED, write_packs

    mx.set_default_device(mx.cpu)
    print(f"mlx {mx.__version__}")
    found: dict[str, Any] = {}
    outputs: dict[str, np.ndarray] = {}
    differences: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        for kind, letter in CODECS.items():
            home = Path(temporary) / kind
            home.mkdir()
            pack = write_packs(kind, home)
            differences[f"velocities, {kind}"] = check_dit(kind, pack, found)
            differences[f"SAME-{letter.upper()}"] = check_codec(kind, letter, home, found, outputs)
        apart, text = check_text(Path(temporary))
        differences["text encoder, fp16"] = apart
        for what, difference in differences.items():
            print(f"{what}: largest difference {difference:.1e}")
        for kind in CODECS:
            home = Path(temporary) / f"{kind}-adapters"
            home.mkdir()
            check_adapters(kind, home)
    if record:
        outputs["hidden"] = text.pop("hidden").astype(np.float16)
        (RECORDED / "cases.json").write_text(json.dumps({"arrays": found, "text": text}, ensure_ascii=False), "utf-8")
        np.savez_compressed(RECORDED / "outputs.npz", **dict[str, Any](outputs))
    text_difference = differences.pop("text encoder, fp16")
    return int(max(differences.values()) > LIMIT or text_difference > 0.02)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], "--record" in sys.argv))
