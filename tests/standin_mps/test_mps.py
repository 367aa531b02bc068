"""The library on a stand-in for Apple's GPU: nothing in float64, no missing operator, and the numbers of the CPU.

What these tests caught: losses of validation and the matching of noise were computed in float64 on the device.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from standin_mps import standin
from standin_mps.standin import stand_in
from torch import Tensor

from helpers.small_model import PEFT_OPTIONS, Small
from helpers.training import make_shards
from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.stack import AdapterStack
from sa3train.adapters.formats.io import load_adapter
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import KINDS, PEFT_METHODS, AdapterSpec
from sa3train.cli.encode import load_encoder
from sa3train.cli.train import main as sa3_train
from sa3train.core.device import move_to_device
from sa3train.core.errors import ConfigError, LibraryError
from sa3train.diffusion import guidance
from sa3train.inference import Generator
from sa3train.models.checkpoint import load_checkpoint
from sa3train.training.optim import OPTIMIZERS, make_optimizer
from sa3train.training.settings import OptimizerSettings, TrainerSettings
from sa3train.training.trainer import choose_training_device

ROOT = Path(__file__).parents[2]
ADAPTER = ROOT / "sa3train" / "assets" / "nano" / "learned" / "koto.safetensors"
SOURCE = (torch.rand(2, 44100, generator=torch.Generator().manual_seed(0)) - 0.5, 44100)
MODES: dict[str, dict[str, Any]] = {
    "text": {},
    "unequal durations": {"prompt": ["a koto", "rain"], "duration": [0.5, 2.0]},
    "init audio": {"init_audio": SOURCE, "init_noise_level": 0.7},
    "inpainting": {"inpaint_audio": SOURCE, "inpaint_mask_start_seconds": 0.2, "inpaint_mask_end_seconds": 0.6},
    "continuation": {"inpaint_audio": SOURCE, "inpaint_mask_start_seconds": 0.8, "inpaint_mask_end_seconds": 1.5}
    | {"duration": 1.5, "keep_exact": True},
}
GUIDED = {"negative_prompt": "noise", "steps": 3, "cfg_scale": 3.0, "apg_scale": 0.5, "cfg_norm_threshold": 2.0}
GUIDED |= {"scale_phi": 0.3, "cfg_interval": (0.2, 0.9)}


def on_both(compute: Callable[[str], Any]) -> tuple[Any, Any]:
    """Compute on the CPU and on the stand-in."""
    expected = compute("cpu")
    with stand_in():
        return expected, compute("mps")


def test_the_stand_in_refuses_what_the_device_refuses() -> None:
    with stand_in():
        x = torch.ones(2, 3, device="mps")
        assert x.device == torch.device("mps:0") and not x.is_cpu and x.cpu().device.type == "cpu"
        refused: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
            "float64": (TypeError, lambda: x.double()),
            "support float64": (TypeError, lambda: torch.ones(2, dtype=torch.float64).to("mps")),
            "aten::linalg_eig": (NotImplementedError, lambda: torch.linalg.eigvals(x @ x.T)),
            "same device": (RuntimeError, lambda: x + torch.ones(2, 3)),
            "asynchronous": (AssertionError, lambda: torch.ones(2).to("mps", non_blocking=True)),
            "generator": (RuntimeError, lambda: torch.randn(2, device="mps", generator=torch.Generator())),
            "numpy": (TypeError, lambda: x.numpy()),
            "pin": (RuntimeError, lambda: x.pin_memory()),
        }
        for words, (kind, act) in refused.items():
            with pytest.raises(kind, match=words):
                act()


@pytest.mark.parametrize(
    ("model", "mode"), [*(("nano", mode) for mode in MODES), ("nano-base", "text"), ("nano-base", "inpainting")]
)
def test_a_generation_has_the_latents_of_the_cpu(model: str, mode: str) -> None:
    settings = {"prompt": "a koto", "duration": 1, "seed": 1, "return_latents": True} | MODES[mode]
    settings |= GUIDED if model == "nano-base" else {"steps": 3}

    def generate(device: str) -> Any:
        generator = Generator.from_pretrained(model, device, "fp32")
        if model == "nano-base":
            generator.load_adapter(ADAPTER, interval=(0.3, 0.9))
        return generator.generate(**settings)

    expected, found = on_both(generate)
    assert type(found.latents) is Tensor and all(type(audio) is Tensor for audio in found.audio)
    torch.testing.assert_close(found.latents, expected.latents, atol=1e-3, rtol=0)


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16"])
def test_a_generation_in_16_bits_succeeds(precision: str) -> None:
    with stand_in():
        generator = Generator.from_pretrained("nano", None, precision)
        output = generator.generate(prompt="a koto", duration=0.5, steps=2)
    assert generator.device.type == "mps"
    assert output.audio[0].isfinite().all()


def test_float64_in_the_library_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests are for: the same generation fails once guidance is computed in float64."""
    monkeypatch.setattr(guidance, "get_widest_float", lambda device: torch.float64)
    with stand_in(), pytest.raises(TypeError, match="float64"):
        Generator.from_pretrained("nano-base", "mps", "fp32").generate(prompt="a koto", duration=0.5, **GUIDED)


def test_an_operator_that_is_missing_is_named_with_the_way_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_softmax", "_softmax.out"):
        monkeypatch.setitem(standin.list_kernels(), name, {"CPU"})
    with stand_in(), pytest.raises(LibraryError, match=r"aten::_softmax\.out on mps.*PYTORCH_ENABLE_MPS_FALLBACK=1"):
        Generator.from_pretrained("nano", "mps", "fp32").generate(prompt="a koto", duration=0.5, steps=1)


@pytest.mark.parametrize(
    "setting", [{"quantize": "int8"}, {"compile": True}, {"devices": 2}, {"num_nodes": 2}, {"strategy": "ddp"}]
)
def test_a_run_refuses_what_the_device_cannot_do(setting: dict[str, Any]) -> None:
    with stand_in():
        assert choose_training_device(TrainerSettings(accelerator="gpu")).type == "mps"
        with pytest.raises(ConfigError, match=f"trainer.{next(iter(setting))}=.* is not supported .*mps"):
            choose_training_device(TrainerSettings(accelerator="mps", **setting))


@pytest.mark.parametrize("option", ["compiled", "cuda_graphs"])
def test_a_generator_refuses_what_the_device_cannot_do(option: str) -> None:
    with stand_in(), pytest.raises(ConfigError, match="on mps"):
        Generator.from_pretrained("nano", "mps", "fp32", **{option: True})


def test_clips_are_encoded_as_on_the_cpu() -> None:
    clips = [SOURCE[0], SOURCE[0][:, :30000]]
    expected, found = on_both(lambda device: load_encoder("nano", "fp32", device).compute_latents(clips, [1, 2]))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("method", "layer"),
    [
        *itertools.product((*KINDS, "lokr", "loha", "hira"), ("linear", "conv1d")),
        *((m, "linear") for m in PEFT_METHODS[3:]),
    ],
)
def test_every_adapter_type_trains_and_plays_as_on_the_cpu(method: str, layer: str) -> None:
    spec = AdapterSpec(method, rank=4, options=PEFT_OPTIONS.get(method, {}))

    def train_and_play(device: str) -> Tensor:
        model = Small(layer).to(device)
        x = move_to_device(model.example(), device)
        torch.manual_seed(0)
        injected = inject(model, spec)
        optimizer = torch.optim.SGD(injected.parameters(), lr=1e-2)
        for _ in range(2):
            model(x).square().mean().backward()
            optimizer.step()
        adapter = injected.export({"base_model": "small"})
        injected.remove()
        return play(model, adapter, x)

    expected, found = on_both(train_and_play)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def play(model: Small, adapter: Adapter, x: Tensor) -> Tensor:
    """Compute with an adapter at half its strength."""
    stack = AdapterStack(model)
    stack.add(adapter, 0.5)
    stack.apply(None)
    with torch.no_grad():
        return model(x).cpu()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_as_on_the_cpu(name: str) -> None:
    def train(device: str) -> list[Tensor]:
        model = Small().to(device)
        x = move_to_device(model.example(), device)
        torch.manual_seed(0)
        injected = inject(model, AdapterSpec("dora-rows", rank=4))
        optimizer = make_optimizer(OptimizerSettings(name=name, lr=1e-3), injected.named_parameters().items())
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(injected.parameters(), 1.0)
            optimizer.step()
        return [parameter.detach().cpu() for parameter in injected.parameters()]

    if name == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    expected, found = on_both(train)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_run_stops_resumes_validates_and_plays_demos_as_on_the_cpu(tmp_path: Path) -> None:
    model = load_checkpoint("nano-base", parts=("dit", "conditioner"))
    facts = {"channels": model.latent_channels, "fingerprint": model.autoencoder_fingerprint()}
    shards = make_shards(tmp_path / "shards", [40, 60, 50, 70], heldout=1, **facts)
    common = ["model=nano-base", "model.dtype=fp32", f"data={shards}", "data.num_workers=0", "data.batch_size=2"]
    common += ["adapter.rank=4"]
    common += [f"callbacks.{name}.every=2" for name in ("validation", "demos", "checkpoint")]
    common += ["callbacks.demos.duration=0.5", "callbacks.demos.steps=2", "callbacks.demos.strengths=[1.0]"]
    common += ["scheduler.warmup_steps=0", "trainer.ema_decay=0.5"]

    def train(device: str) -> Adapter:
        run_dir = tmp_path / device
        for steps in (2, 3):
            arguments = [*common, f"trainer.accelerator={device}", f"trainer.max_steps={steps}"]
            again = [f"resume={run_dir}", "allow_resume_changes=[trainer.max_steps]"] if steps == 3 else []
            assert sa3_train([*arguments, *(again or [f"run_dir={run_dir}"])]) == 0
        return load_adapter(run_dir / "adapter.safetensors")

    expected, found = on_both(train)
    both = [
        torch.cat([tensor.flatten() for part in each.tensors.values() for tensor in part.values()])
        for each in (expected, found)
    ]
    # By norm: where a gradient is nothing but rounding (no clip of the batch is inpainted), Adam's steps are its sign.
    assert (both[0] - both[1]).norm() < 1e-3 * both[0].norm()
    assert len(list((tmp_path / "mps" / "demos").rglob("*.wav"))) > 0
