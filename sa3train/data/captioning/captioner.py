"""Describe audio by a captioning model of transformers, by its name on the hub or its folder."""

from dataclasses import dataclass
from typing import Any

import torch

from sa3train.audio.resample import resample
from sa3train.core.errors import ConfigError
from sa3train.data.sources.text import tidy
from sa3train.models.hub import check_reachable

PROMPT = "Describe this sound in one short sentence: instruments, mood, genre."
"""What a model that reads text is asked."""
MOST_TOKENS = 64
MOST_SECONDS = 30.0
"""Audio that a model hears of a clip, in seconds."""


@dataclass(frozen=True)
class Captioner:
    """A captioning model.

    Attributes:
        pipeline: A pipeline of transformers: "any-to-any" for models that read audio and text, or
            "automatic-speech-recognition" for those that write down what they hear.
    """

    pipeline: Any

    @classmethod
    def load(cls, name: str, device: str = "cpu") -> "Captioner":
        """Load a model.

        Args:
            name: Name on the hub, or a folder.
            device: Device to run on.

        Returns:
            The model.

        Raises:
            CheckpointError: When the hub does not show it.
            ConfigError: When there is no such model, or it reads no audio.
        """
        from transformers import AutoConfig, pipeline
        from transformers.models.auto import modeling_auto

        check_reachable(name)
        try:
            kind = AutoConfig.from_pretrained(name).model_type
            is_seq2seq = kind in modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
            made = pipeline("automatic-speech-recognition" if is_seq2seq else "any-to-any", model=name, device=device)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"cannot load the captioning model {name}: {error}") from error
        if made.feature_extractor is None and not hasattr(made.processor, "feature_extractor"):
            raise ConfigError(f"{name} reads no audio: name a model that describes audio.")
        return cls(made)

    def describe(self, audio_CN: torch.Tensor, rate: int) -> str:
        """Describe a clip.

        Args:
            audio_CN: (C, N) samples.
            rate: Sample rate in Hz.

        Returns:
            Text on one line.
        """
        extractor = self.pipeline.feature_extractor or self.pipeline.processor.feature_extractor
        mono_N = resample(audio_CN, rate, extractor.sampling_rate).mean(0)
        mono_N = mono_N[: round(MOST_SECONDS * extractor.sampling_rate)]
        if self.pipeline.task == "automatic-speech-recognition":
            heard = {"raw": mono_N.numpy(), "sampling_rate": extractor.sampling_rate}
            return tidy(str(self.pipeline(heard, generate_kwargs={"max_new_tokens": MOST_TOKENS})["text"]))
        content = [{"type": "audio", "audio": mono_N.numpy()}, {"type": "text", "text": PROMPT}]
        found = self.pipeline(
            text=[{"role": "user", "content": content}], max_new_tokens=MOST_TOKENS, return_full_text=False
        )
        return tidy(str(found[0]["generated_text"]))
