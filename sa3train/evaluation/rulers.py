"""Rulers: how well a generated clip agrees with its prompt, by what is at hand for measuring it.

Shapes: C channels, N samples.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from sa3train.audio.resample import resample
from sa3train.core.errors import ConfigError
from sa3train.evaluation.attributes import ATTRIBUTES
from sa3train.evaluation.classifier import Classifier
from sa3train.models.hub import check_reachable
from sa3train.models.nano import ASSETS

_WORDS = {"register": ("low register", "high register")}
"""Words of a prompt that ask for the first or second answer of an attribute; for the others, the answers themselves."""


class Ruler(ABC):
    """Measures agreement with a prompt. Values of one ruler compare with each other only."""

    name: str
    meaning: str

    @abstractmethod
    def measure(self, audio_CN: Tensor, sample_rate: int, prompt: str) -> float | None:
        """Measure a clip.

        Args:
            audio_CN: The clip.
            sample_rate: Samples per second.
            prompt: The prompt it was generated from.

        Returns:
            The agreement, higher is better; None where the prompt asks for nothing that this ruler measures.
        """


class ClassRuler(Ruler):
    """The probability that nano's classifier gives to the sound that the prompt names."""

    name, meaning = "class", "probability of the sound that the prompt names, by nano's classifier"

    def __init__(self) -> None:
        self._classifier = Classifier.load(ASSETS / "classifier.safetensors")

    @override
    def measure(self, audio_CN: Tensor, sample_rate: int, prompt: str) -> float | None:
        """Measure the probability of the longest class name in the prompt."""
        named = [name for name in self._classifier.names if _has_words(prompt, name)]
        if not named:
            return None
        wanted = self._classifier.names.index(max(named, key=len))
        return float(self._classifier.predict(audio_CN, sample_rate)[wanted])


class AttributeRuler(Ruler):
    """The share of attributes named in the prompt, such as "bright" or "slow", that are heard in the clip."""

    name, meaning = (
        "attributes",
        "share of the named attributes (low register, bright, slow, noisy, mono …) that are heard",
    )

    @override
    def measure(self, audio_CN: Tensor, sample_rate: int, prompt: str) -> float | None:
        """Measure every attribute of which the prompt names one answer."""
        right = []
        for name, attribute in ATTRIBUTES.items():
            asked = [_has_words(prompt, words) for words in _WORDS.get(name, (attribute.less, attribute.more))]
            if asked[0] != asked[1]:
                right.append(
                    attribute.answer(audio_CN, sample_rate) == (attribute.more if asked[1] else attribute.less)
                )
        return sum(right) / len(right) if right else None


class ClapRuler(Ruler):
    """The cosine similarity of clip and prompt by a CLAP model (Wu et al. 2023) of transformers.

    Args:
        model: Name or folder of the model, such as "laion/larger_clap_music".

    Raises:
        CheckpointError: If the hub does not show it.
        ConfigError: If there is no such model.
    """

    name, meaning = "clap", "cosine similarity of clip and prompt by the CLAP model"

    def __init__(self, model: str | os.PathLike[str]) -> None:
        from transformers import AutoProcessor, ClapModel

        check_reachable(os.fspath(model))
        try:
            self._model = ClapModel.from_pretrained(os.fspath(model)).eval()
            self._processor: Any = AutoProcessor.from_pretrained(os.fspath(model))
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"{model} is no CLAP model that transformers loads ({first}). Name one that is downloaded, or a folder "
                "with one, such as laion/larger_clap_music."
            ) from error

    @override
    @torch.no_grad()
    def measure(self, audio_CN: Tensor, sample_rate: int, prompt: str) -> float | None:
        """Measure the similarity; an empty prompt asks for nothing."""
        if not prompt.strip():
            return None
        rate = self._processor.feature_extractor.sampling_rate
        mono_N = resample(audio_CN.mean(dim=0, keepdim=True), sample_rate, rate)[0].numpy()
        inputs = self._processor(
            text=[prompt], audio=[mono_N], sampling_rate=rate, return_tensors="pt", padding=True, truncation=True
        )
        found = self._model(**inputs)
        return float(torch.cosine_similarity(found.text_embeds, found.audio_embeds)[0])


def list_rulers(clap: str | os.PathLike[str] | None = None) -> list[Ruler]:
    """List the rulers at hand.

    Args:
        clap: Name or folder of a CLAP model; None for none.

    Returns:
        nano's two rulers, and CLAP's.
    """
    rulers: list[Ruler] = [ClassRuler(), AttributeRuler()]
    return rulers if clap is None else [*rulers, ClapRuler(clap)]


def measure_agreement(rulers: Sequence[Ruler], audio_CN: Tensor, sample_rate: int, prompt: str) -> dict[str, float]:
    """Measure a clip with every ruler that its prompt can be measured by.

    Args:
        rulers: The rulers.
        audio_CN: The clip.
        sample_rate: Samples per second.
        prompt: The prompt it was generated from.

    Returns:
        Agreement by ruler.
    """
    found = {ruler.name: ruler.measure(audio_CN, sample_rate, prompt) for ruler in rulers}
    return {name: value for name, value in found.items() if value is not None}


def _has_words(prompt: str, words: str) -> bool:
    return re.search(rf"\b{re.escape(words)}\b", prompt, re.IGNORECASE) is not None
