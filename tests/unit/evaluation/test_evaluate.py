"""Evaluations on nano with few clips and steps: equal noise for all, nothing left behind, and clear refusals."""

import html
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.nano_adapters import write_lora_adapters
from helpers.shards import make_data_module
from helpers.training import make_shards
from sa3train.adapters.adapter import Adapter
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.adapters.layer_filter import find_adaptable_layers
from sa3train.adapters.spec import AdapterSpec
from sa3train.cli.eval import build_parser, find_inputs, main
from sa3train.core.errors import AdapterError, ConfigError, DataError
from sa3train.evaluation import Evaluation, EvaluationSettings, evaluate_adapters, load_generator
from sa3train.evaluation.clips import load_clips
from sa3train.inference import Generator
from sa3train.models.checkpoint import load_checkpoint
from sa3train.training.callbacks.validation import list_heldout_clips, measure_module_losses
from sa3train.training.prompt_embeddings import PromptEmbedder
from sa3train.training.run import build_module
from sa3train.training.settings import TrainingSettings

pytestmark = pytest.mark.slow
FEW: dict[str, Any] = {"clips": 3, "generated": 2, "steps": 2, "seconds": 1.0}


@pytest.fixture(scope="module")
def generator() -> Generator:
    return load_generator("nano-base", "cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, generator: Generator) -> Path:
    """Four training and three held-out clips of about a second and a half, as if nano had encoded them."""
    fingerprint = generator.model.autoencoder_fingerprint()
    folder = tmp_path_factory.mktemp("shards")
    channels = generator.model.latent_channels
    return make_shards(folder, [14, 15, 16, 17, 14, 15, 16], 3, channels, fingerprint=fingerprint)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("adapters")
    write_lora_adapters(folder)
    return [str(folder / f"{name}.safetensors") for name in ("one", "two")]


@pytest.fixture(scope="module")
def found(generator: Generator, shards: Path, adapters: list[str]) -> Evaluation:
    return evaluate_adapters([*adapters, adapters[0]], shards, generator, strengths=(0.5, 1.0), **FEW)


def test_everything_is_measured_on_equal_noise(found: Evaluation, adapters: list[str]) -> None:
    assert [(each.adapter, each.strength) for each in found.candidates] == [
        (path, strength) for path in (*adapters, adapters[0]) for strength in (0.5, 1.0)
    ]
    first, again = found.candidates[1].measurement, found.candidates[5].measurement
    assert first == again, "the same adapter measures the same, whatever was measured in between"
    assert first != found.candidates[3].measurement
    for each in (found.base, first):
        assert len(each.losses_IN) == 3 and len(each.losses_IN[0]) == 10 and len(each.generated) == 2
        assert each.frechet is not None and each.memorization is not None and each.average("nearest") is not None
        assert each.average("loudness_lufs") is not None
    assert found.pick is not None and found.picked is None, "three clips cannot tell"
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["candidates"][0]["strength"] == 0.5


def test_the_model_is_left_as_it_was(
    generator: Generator, found: Evaluation, shards: Path, adapters: list[str]
) -> None:
    again = evaluate_adapters(adapters[1], shards, generator, EvaluationSettings(clips=3, generated=0))
    assert len(generator.stack) == 0
    assert again.base.losses_IN == found.base.losses_IN
    assert again.candidates[0].measurement.losses_IN == found.candidates[3].measurement.losses_IN
    assert again.prompts == [] and again.base.frechet is None


def test_a_stopped_evaluation_leaves_the_model_as_it_was(
    generator: Generator, shards: Path, adapters: list[str]
) -> None:
    def stop(candidate: int, *_: Any) -> None:
        if candidate == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_adapters(adapters, shards, generator, strengths=(0.5, 1.0), keep_audio=stop, **FEW)
    assert len(generator.stack) == 0
    fresh = load_checkpoint("nano-base").dit.state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in generator.model.dit.state_dict().items())


def test_the_loss_is_that_of_validation(found: Evaluation, shards: Path, adapters: list[str]) -> None:
    """Training measures an adapter inside the model, the evaluation one on its weights."""
    model = load_checkpoint("nano-base")
    adapter = load_adapter(adapters[0])
    module = build_module(model, PromptEmbedder(model.conditioner), adapter.spec, TrainingSettings(), adapter)
    clips = list_heldout_clips(make_data_module(shards, 2), 3)
    with module.injected.scale(0.5):
        half_IN = measure_module_losses(module, clips, seed=0, batch_size=20)
    whole_IN = measure_module_losses(module, clips, seed=0, batch_size=20)
    for candidate, loss_IN in zip(found.candidates, (half_IN, whole_IN), strict=False):
        torch.testing.assert_close(
            torch.tensor(candidate.measurement.losses_IN).double(), loss_IN, atol=1e-5, rtol=1e-4
        )


def test_what_cannot_be_evaluated_is_refused(
    generator: Generator, shards: Path, adapters: list[str], tmp_path: Path
) -> None:
    path, layer = next(iter(find_adaptable_layers(generator.model.get_adapter_root("decoder")).items()))
    rows, cols = layer.weight.flatten(1).shape
    tensors = {path: {"lora_A": torch.ones(1, cols), "lora_B": torch.ones(rows, 1)}}
    decoder = Adapter(AdapterSpec("lora", rank=1), tensors, {}, "d")
    save_adapter(tmp_path / "decoder.safetensors", decoder)
    with pytest.raises(AdapterError, match="autoencoder's decoder"):
        evaluate_adapters(tmp_path / "decoder.safetensors", shards, generator)
    with pytest.raises(ConfigError, match="strength 0 is the base"):
        evaluate_adapters(adapters, shards, generator, strengths=(0, 1))
    with pytest.raises(ConfigError, match="no adapter"):
        evaluate_adapters([], shards, generator)
    other = make_shards(tmp_path / "other", [8, 8], 1, generator.model.latent_channels)
    with pytest.raises(DataError, match="made by the autoencoder of"):
        evaluate_adapters(adapters, other, generator)
    fingerprint = generator.model.autoencoder_fingerprint()
    whole = make_shards(tmp_path / "whole", [8, 9], 0, generator.model.latent_channels, fingerprint=fingerprint)
    with pytest.raises(DataError, match="--all-clips"):
        load_clips(whole, generator.model, 4)
    assert len(load_clips(whole, generator.model, 4, use_all=True).heldout) == 2


def test_the_command_writes_table_page_and_json(
    shards: Path, adapters: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(shards), "--model", "nano-base", "--strengths", "0.5,1", "--generate", "1", "--steps", "1"]
    flags += ["--seconds", "1", "--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html"), "--pick"]
    assert main([*adapters, *flags]) == 0
    printed = capsys.readouterr().out
    assert "one" in printed and "Fréchet" in printed and printed.splitlines()[-1].startswith("pick: base")
    written = json.loads((tmp_path / "out.json").read_text())
    assert [each["strength"] for each in written["candidates"]] == [0.5, 1.0, 0.5, 1.0]
    page = (tmp_path / "out.html").read_text()
    assert page.count("<audio") == 6, "the held-out clip, the base, and two adapters at two strengths"
    assert "To use: base" in page


def test_a_run_stands_for_its_checkpoints(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sa3train.cli.train import main as train

    run = tmp_path / "style"
    settings = [
        "model=nano-base",
        "trainer.max_steps=2",
        "callbacks.checkpoint.every=1",
        "callbacks.demos.enabled=false",
    ]
    settings += ["callbacks.validation.clips=2", "scheduler.warmup_steps=1", "data.num_workers=0", f"run_dir={run}"]
    assert train([f"data={shards}", *settings]) == 0
    validation = json.loads((run / "validation.json").read_text())
    assert [row["strength"] for row in validation["strengths"]] == [0.5, 0.75, 1.25]
    capsys.readouterr()
    assert main([str(run), "--generate", "0", "--json", str(run / "evaluation.json"), "--pick"]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert found["pick"]["text"] in html.unescape((run / "report.html").read_text()), "the report tells what was found"
    assert [(each["adapter"], each["step"]) for each in found["candidates"]] == [(f"{run}@1", 1), (f"{run}@2", 2)]
    assert "style@1" in capsys.readouterr().out
    assert find_inputs(build_parser().parse_args([str(run), "--data", "other"])) == ("other", "nano-base")


def test_wrong_flags_are_named(adapters: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*adapters, "--model", "nano-base"]) == 1
    assert "--data must be given: no adapter is in the folder of a run" in capsys.readouterr().err
    assert main(["nope", "--pick"]) == 1
    assert "There is nothing at nope" in capsys.readouterr().err
    assert main([*adapters, "--data", "x", "--model", "nano-base", "--clips", "0"]) == 1
    assert "clips=0 must be at least 1" in capsys.readouterr().err
    assert main([*adapters, "--data", "x", "--model", "nano-base", "--json", adapters[0]]) == 1
    assert "would replace the input" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*adapters, "--strengths", "much"])
    assert "write 0.5,1" in capsys.readouterr().err
