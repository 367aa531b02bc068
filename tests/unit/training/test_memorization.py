"""What is measured of a finished adapter when a run ends, and written to the run folder."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.shards import make_data_module
from helpers.training import make_shards
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.evaluation.distances import ReferenceClips
from sa3train.models.checkpoint import load_checkpoint
from sa3train.training import memorization
from sa3train.training.callbacks.validation import list_heldout_clips, list_training_clips
from sa3train.training.memorization import evaluate_memorization
from sa3train.training.settings import DemoSettings


@pytest.fixture(scope="module")
def nano_adapter() -> Any:
    """An adapter for nano whose low-rank products are not zero."""
    model = load_checkpoint("nano", parts=("dit", "conditioner"))
    injected = inject(model.get_adapter_root(), AdapterSpec("lora", rank=2))
    with torch.no_grad():
        for name, parameter in injected.named_parameters().items():
            if name.endswith("lora_B"):
                parameter.fill_(0.01)
    return model, injected.export({})


@pytest.mark.slow
@pytest.mark.parametrize("heldout", [1, 0])
def test_the_end_of_a_run_writes_it_and_leaves_randomness_alone(
    nano_adapter: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, heldout: int
) -> None:
    model, adapter = nano_adapter
    folder = make_shards(tmp_path / "data", [18, 20, 22], heldout=heldout, channels=model.latent_channels)
    data = make_data_module(folder, 1)
    data.setup()
    before = torch.random.get_rng_state()
    settings = DemoSettings(memorization_clips=2, duration=1.0)
    training, held = list_training_clips(data, 2), list_heldout_clips(data, 2)
    evaluate_memorization(tmp_path, "nano", adapter, training, held, settings, "cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    found = json.loads((tmp_path / "memorization.json").read_text())
    assert set(found["spread"]) == {"data", "base", "adapter"}
    if heldout:
        assert found["memorization"]["score"] > 0
        assert [row["clip"] for row in found["memorization"]["nearest"]] == [0, 1]
    else:
        assert "memorization" not in found
        assert "no memorization score" in caplog.text


@pytest.mark.parametrize("is_copy", [True, False])
def test_copies_are_told_against_what_the_base_makes_of_the_same_prompts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_copy: bool
) -> None:
    clips = torch.randn(12, 3, 40, generator=torch.Generator().manual_seed(0))
    training, held, new = clips[:4], clips[4:8], clips[8:]
    generator = SimpleNamespace(facts=SimpleNamespace(longest=9.0), load_adapter=lambda adapter: None)
    monkeypatch.setattr(memorization, "Generator", SimpleNamespace(from_pretrained=lambda *args, **options: generator))
    made = iter([new, training + 0.01 if is_copy else held.flip(0) + new / 9])
    monkeypatch.setattr(memorization, "generate_latents", lambda *args, **sampling: list(next(made)))
    batches: list[Any] = [
        [SimpleNamespace(prompts=[str(n)], keys=[str(n)], data_SCF=clip[None]) for n, clip in enumerate(part)]
        for part in (training, held)
    ]
    adapter: Any = None
    settings = DemoSettings(memorization_clips=4)
    found = evaluate_memorization(tmp_path, "nano", adapter, batches[0], batches[1], settings, "cpu")
    scores = found["memorization"]
    direct = ReferenceClips(list(held), list(training), list("0123")).measure_memorization(list(new)).score
    assert scores["base_score"] == pytest.approx(direct) and scores["base_score"] != scores["score"]
    assert (found["clips"], scores["heldout_clips"]) == (4, 4)
    assert ("they may be copies. Use fewer steps" in caplog.text) == is_copy
