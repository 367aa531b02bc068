"""Every Python example of the documents runs as it stands, pasted in order, on nano."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.audio import tone, write_clip
from helpers.documents import DOCUMENTS, ROOT
from helpers.nano_adapters import write_lora_adapters
from helpers.training import make_shards
from sa3train.inference import settings
from sa3train.models.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

EXAMPLES = {
    document.relative_to(ROOT).as_posix(): blocks
    for document in DOCUMENTS
    if (blocks := re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL))
}


class Transformer(torch.nn.Module):
    """What the example of diffusers hooks into: it returns the local condition that it is given."""

    config = SimpleNamespace(local_add_cond_dim=3)

    def forward(self, x_BCT: torch.Tensor, local_add_cond: torch.Tensor) -> torch.Tensor:
        return local_add_cond


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    write_lora_adapters(folder, ("style", "cello", "other"))
    checkpoints = folder / "runs" / "style" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copy(folder / "style.safetensors", checkpoints / "step-00000300.safetensors")
    write_clip(folder / "input.wav", tone(10.0))
    fingerprint = load_checkpoint("nano-base", parts=("dit",)).autoencoder_fingerprint()
    make_shards(folder / "latents", [8, 9, 10, 11], heldout=2, channels=128, fingerprint=fingerprint)
    return folder


@pytest.mark.parametrize("document", EXAMPLES)
def test_the_examples_run_one_after_another(document: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for defaults in settings.MODEL_DEFAULTS.values():
        monkeypatch.setitem(defaults, "steps", 2)
    names: dict[str, Any] = {"pipe": SimpleNamespace(transformer=Transformer())}
    for example in EXAMPLES[document]:
        exec(compile(example, document, "exec"), names)
    if "add_local_condition" in names:
        condition = names["pipe"].transformer(torch.ones(2, 5, 7))
        assert condition.shape == (2, 3, 7) and not condition.any()


def test_the_documents_have_examples() -> None:
    assert {"README.md", "inference/README.md", "docs/evaluation.md", "docs/interchange.md"} <= EXAMPLES.keys()
