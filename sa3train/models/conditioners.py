"""Prompt and duration become the conditions of the DiT (docs/model.md, section 3).

Shape legend: B clips, L tokens (at most `max_length`), M = max_length + 1 context tokens, D condition width.
Module names are those of the released files under `conditioner.`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn

from sa3train.core.device import move_to_device
from sa3train.core.errors import CheckpointError
from sa3train.models.blocks import FourierFeatures
from sa3train.models.config import ConditionerConfig, NumberConfig
from sa3train.models.t5gemma import T5GemmaEncoder, load_encoder
from sa3train.models.text_source import TextEncoderSource


class TextEmbedding(NamedTuple):
    """Hidden states of the frozen text encoder, padded on the right.

    Attributes:
        hidden_BLD: Hidden states.
        mask_BL: True = token.
    """

    hidden_BLD: Tensor
    mask_BL: Tensor

    def split(self) -> list[Tensor]:
        """Split into prompts without padding, as they are cached.

        Returns:
            Hidden states (L_i, D) of each prompt.
        """
        return [hidden[mask] for hidden, mask in zip(self.hidden_BLD, self.mask_BL, strict=True)]

    @staticmethod
    def join(prompts: Sequence[Tensor]) -> "TextEmbedding":
        """Join prompts: the inverse of `split`.

        Args:
            prompts: Hidden states (L_i, D) of each prompt.

        Returns:
            Embedding as long as the longest prompt.
        """
        lengths = torch.tensor([prompt.shape[0] for prompt in prompts], device=prompts[0].device)
        hidden_BLD = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        mask_BL = torch.arange(hidden_BLD.shape[1], device=lengths.device) < lengths[:, None]
        return TextEmbedding(hidden_BLD, mask_BL)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Conditions of the DiT.

    Attributes:
        cross_attn_cond_BLD: Prompt tokens and the duration token.
        global_cond_BD: Duration embedding.
        prompt_mask_BL: True = token. Only negative prompts need it; cross-attention sees all positions.
    """

    cross_attn_cond_BLD: Tensor
    global_cond_BD: Tensor
    prompt_mask_BL: Tensor


class TextEncoder:
    """T5Gemma's encoder with its tokenizer, loaded on first use. Not an `nn.Module`: it is never trained or adapted.

    Attributes:
        source: Where its files are.
        max_length: Tokens of a prompt that are read.
    """

    def __init__(self, source: TextEncoderSource, max_length: int) -> None:
        self.source = source
        self.max_length = max_length
        self._tokenizer: Tokenizer | None = None
        self._model: T5GemmaEncoder | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether the encoder's weights are in memory."""
        return self._model is not None

    def release(self) -> None:
        """Release the encoder's memory. The next use loads it again."""
        self._model = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The folder's `tokenizer.json`, without truncation and padding."""
        if self._tokenizer is None:
            path = self.source.tokenizer_folder() / "tokenizer.json"
            try:
                content = path.read_text(encoding="utf-8")
                if "model" not in json.loads(content):
                    raise ValueError("tokenizer.json contains no model")
            except (OSError, ValueError) as error:
                raise _explain_unreadable(path.parent, error) from error
            self._tokenizer = Tokenizer.from_str(content)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        return self._tokenizer

    def model(self, device: torch.device) -> T5GemmaEncoder:
        """Load the encoder, in its file's dtype.

        Args:
            device: Where it is needed.

        Returns:
            The encoder.

        Raises:
            CheckpointError: Files are missing or damaged.
        """
        if self._model is None:
            folder = self.source.folder()
            try:
                self._model = load_encoder(folder)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                raise _explain_unreadable(folder, error) from error
        return self._model.to(device)

    def _tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        return [each.ids for each in self.tokenizer.encode_batch(list(prompts), add_special_tokens=False)]

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Count the tokens of prompts before truncation.

        Args:
            prompts: Prompts.

        Returns:
            Tokens of each; those after `max_length` are not read.
        """
        return [len(ids) for ids in self._tokenize(prompts)]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], device: torch.device) -> TextEmbedding:
        """Compute hidden states of prompts, as long as the longest and truncated to `max_length` tokens."""
        ids = [torch.tensor(each[: self.max_length], dtype=torch.long) for each in self._tokenize(prompts)]
        ids_BL = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        lengths_B = move_to_device(torch.tensor([len(each) for each in ids]), device)
        mask_BL = torch.arange(ids_BL.shape[1], device=device) < lengths_B[:, None]
        model = self.model(device)
        if ids_BL.shape[1] == 0:
            return TextEmbedding(
                torch.zeros(*ids_BL.shape, model.config.width, dtype=model.dtype, device=device), mask_BL
            )
        return TextEmbedding(torch.where(mask_BL[..., None], model(ids_BL, mask_BL), 0), mask_BL)


def _explain_unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"the text encoder in {folder} cannot be loaded ({error}). Download the model again.")


class PromptConditioner(nn.Module):
    """Holds the learned embedding that replaces padding, and the text encoder, which is not registered as a module."""

    def __init__(self, width: int, encoder: TextEncoder) -> None:
        super().__init__()
        self.padding_embedding = nn.Parameter(nn.init.normal_(torch.empty(width), std=0.02))
        self.encoder = encoder

    def forward(self, text: TextEmbedding) -> tuple[Tensor, Tensor]:
        hidden_BLD, mask_BL = text
        missing = self.encoder.max_length - hidden_BLD.shape[1]
        if missing < 0 or hidden_BLD.shape[2] != self.padding_embedding.shape[0]:
            raise ValueError(
                f"text embeddings {tuple(hidden_BLD.shape)} do not fit {self.encoder.max_length} tokens of width "
                f"{self.padding_embedding.shape[0]}"
            )
        padding = self.padding_embedding
        hidden_BLD = nn.functional.pad(hidden_BLD.to(padding), (0, 0, 0, missing))
        mask_BL = nn.functional.pad(mask_BL.to(padding.device), (0, missing))
        return torch.where(mask_BL[..., None], hidden_BLD, padding), mask_BL


class NumberEmbedder(nn.Module):
    """Fourier features of a number in 0..1, then a linear map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        features = FourierFeatures()
        self.embedding = nn.Sequential(features, nn.Linear(features.width, width))

    def forward(self, value_B: Tensor) -> Tensor:
        features, linear = self.embedding
        dtype = linear.weight.dtype
        return linear(features(value_B).to(dtype if dtype.is_floating_point else torch.float32))


class NumberConditioner(nn.Module):
    """A number of seconds as one token (B, 1, D)."""

    def __init__(self, width: int, config: NumberConfig) -> None:
        super().__init__()
        self.config = config
        self.embedder = NumberEmbedder(width)

    def forward(self, seconds_B: Tensor) -> Tensor:
        low, high = self.config.min_value, self.config.max_value
        return self.embedder((seconds_B.float().clamp(low, high) - low) / (high - low))[:, None]


class Conditioner(nn.Module):
    """Prompt and duration to conditions. Only `conditioners` holds parameters; the text encoder is loaded on first use.

    Attributes:
        config: Widths and ranges.
        text_encoder: The frozen encoder of prompts.
        conditioners: "prompt" and "seconds_total".
    """

    def __init__(self, config: ConditionerConfig, source: TextEncoderSource) -> None:
        super().__init__()
        self.config = config
        self.text_encoder = TextEncoder(source, config.text.max_length)
        self.conditioners = nn.ModuleDict(
            {
                "prompt": PromptConditioner(config.width, self.text_encoder),
                "seconds_total": NumberConditioner(config.width, config.seconds),
            }
        )

    @property
    def max_length(self) -> int:
        """Tokens of a prompt that are read."""
        return self.text_encoder.max_length

    @property
    def device(self) -> torch.device:
        """Where the conditions are computed."""
        padding = self.conditioners["prompt"].padding_embedding
        if not isinstance(padding, Tensor):
            raise TypeError("the prompt conditioner has no padding embedding")
        return padding.device

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Count the tokens of prompts before truncation to `max_length`.

        Args:
            prompts: Prompts.

        Returns:
            Tokens of each.
        """
        return self.text_encoder.count_tokens(prompts)

    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbedding:
        """Encode prompts by the frozen text encoder, without gradients. Loads it on first use.

        Args:
            prompts: At least one prompt, which may be empty; no prompt is a `ValueError`.

        Returns:
            Hidden states as long as the longest prompt.
        """
        if not prompts:
            raise ValueError("prompts is empty. Pass at least one prompt, which may be an empty string.")
        return self.text_encoder(prompts, self.device)

    def condition(self, text: TextEmbedding, seconds_B: Tensor) -> Conditioning:
        """Compute conditions from text embeddings.

        Args:
            text: Embeddings of at most `max_length` tokens.
            seconds_B: Durations in seconds.

        Returns:
            Conditions of the DiT.
        """
        prompt_BLD, mask_BL = self.conditioners["prompt"](text)
        seconds_B1D = self.conditioners["seconds_total"](seconds_B.to(self.device))
        return Conditioning(torch.cat((prompt_BLD, seconds_B1D), dim=1), seconds_B1D[:, 0], mask_BL)

    def forward(self, prompts: Sequence[str], seconds: Sequence[float] | Tensor) -> Conditioning:
        seconds_B = move_to_device(torch.as_tensor(seconds, dtype=torch.float32), self.device)
        return self.condition(self.encode_prompts(prompts), seconds_B)
