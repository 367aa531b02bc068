"""What is measured of a finished adapter when a run ends, and written to the run folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.shards import make_data_module
from helpers.training import make_shards
from sa3train.adapters.layers.inject import inject
from sa3train.adapters.spec import AdapterSpec
from sa3train.models.checkpoint import load_checkpoint
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
