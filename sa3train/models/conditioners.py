"""Prompt and duration become the conditions of the DiT.

Shape legend: B items, L tokens (at most `max_length`), M = max_length + 1 context tokens, D condition width.
Module names are those of the released files under `conditioner.`.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn

from sa3train.core.device import to_device
from sa3train.core.errors import CheckpointError
from sa3train.models.blocks import FourierFeatures
from sa3train.models.config import ConditionerConfig, NumberConfig
from sa3train.models.hub import TextEncoderSource
from sa3train.models.t5gemma import T5GemmaEncoder, load_encoder


class TextEmbedding(NamedTuple):
    """Hidden states of the frozen text encoder, and which positions are tokens (right-padded; True = token)."""

    hidden_BLD: Tensor
    mask_BL: Tensor

    def split(self) -> list[Tensor]:
        """Each prompt's hidden states without padding, (L_i, D): the form to cache."""
        return [hidden[mask] for hidden, mask in zip(self.hidden_BLD, self.mask_BL, strict=True)]

    @staticmethod
    def join(prompts: Sequence[Tensor]) -> "TextEmbedding":
        """The inverse of `split`; as long as the longest prompt."""
        lengths = torch.tensor([prompt.shape[0] for prompt in prompts], device=prompts[0].device)
        hidden_BLD = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        mask_BL = torch.arange(hidden_BLD.shape[1], device=lengths.device) < lengths[:, None]
        return TextEmbedding(hidden_BLD, mask_BL)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the DiT takes. The prompt mask (True = token) is for negative prompts; cross-attention sees all."""

    cross_attn_cond_BLD: Tensor
    global_cond_BD: Tensor
    prompt_mask_BL: Tensor


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no remarks about unused decoder weights from transformers inside the block."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class TextEncoder:
    """T5Gemma's encoder with its tokenizer, loaded on first use. Not an `nn.Module`: it is never trained or adapted."""

    def __init__(self, source: TextEncoderSource, max_length: int) -> None:
        self.source = source
        self.max_length = max_length
        self._tokenizer: Tokenizer | None = None
        self._model: T5GemmaEncoder | None = None

    @property
    def loaded(self) -> bool:
        """Whether the encoder's weights are in memory."""
        return self._model is not None

    def release(self) -> None:
        """Give back the encoder's memory; the next use loads it again."""
        self._model = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The folder's `tokenizer.json`, without truncation or padding. Raises `CheckpointError` when it is broken."""
        if self._tokenizer is None:
            path = self.source.folder() / "tokenizer.json"
            try:
                content = path.read_text(encoding="utf-8")
                if "model" not in json.loads(content):
                    raise ValueError("tokenizer.json has no model in it")
            except (OSError, ValueError) as error:
                raise _unreadable(path.parent, error) from error
            self._tokenizer = Tokenizer.from_str(content)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        return self._tokenizer

    def model(self, device: torch.device) -> T5GemmaEncoder:
        """The encoder on `device`, in its file's dtype. Raises `CheckpointError` when files are missing or broken."""
        if self._model is None:
            folder = self.source.folder()
            try:
                self._model = load_encoder(folder)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                raise _unreadable(folder, error) from error
        return self._model.to(device)

    def _tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        return [each.ids for each in self.tokenizer.encode_batch(list(prompts), add_special_tokens=False)]

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before truncation; above `max_length` the rest of the prompt goes unread."""
        return [len(ids) for ids in self._tokens(prompts)]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], device: torch.device) -> TextEmbedding:
        """Hidden states of each prompt, as long as the longest (cut at `max_length` tokens)."""
        ids = [torch.tensor(each[: self.max_length], dtype=torch.long) for each in self._tokens(prompts)]
        ids_BL = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        lengths_B = to_device(torch.tensor([len(each) for each in ids]), device)
        mask_BL = torch.arange(ids_BL.shape[1], device=device) < lengths_B[:, None]
        model = self.model(device)
        if ids_BL.shape[1] == 0:
            return TextEmbedding(
                torch.zeros(*ids_BL.shape, model.config.width, dtype=model.dtype, device=device), mask_BL
            )
        return TextEmbedding(torch.where(mask_BL[..., None], model(ids_BL, mask_BL), 0), mask_BL)


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"the text encoder in {folder} cannot be loaded ({error}). Download the model again.")


class PromptConditioner(nn.Module):
    """Holds the learned embedding that replaces padding. The text encoder hangs beside it, unregistered."""

    def __init__(self, width: int, encoder: TextEncoder) -> None:
        super().__init__()
        self.padding_embedding = nn.Parameter(nn.init.normal_(torch.empty(width), std=0.02))
        self.encoder = encoder

    def forward(self, text: TextEmbedding) -> tuple[Tensor, Tensor]:
        """Prompt tokens (B, max_length, D) and their mask. Raises `ValueError` when there are too many."""
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
    """Prompt and seconds to conditions. Only `conditioners` holds parameters; the text encoder loads on first use."""

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
        """The most tokens of a prompt that are read."""
        return self.text_encoder.max_length

    @property
    def device(self) -> torch.device:
        """Where the conditions are computed."""
        padding = self.conditioners["prompt"].padding_embedding
        if not isinstance(padding, Tensor):
            raise TypeError("the prompt conditioner lost its padding embedding")
        return padding.device

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before truncation; compare with `max_length`."""
        return self.text_encoder.token_counts(prompts)

    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbedding:
        """Frozen hidden states, without gradients, as long as the longest prompt. Loads T5Gemma on first use."""
        if not prompts:
            raise ValueError("no prompt given; an empty string is a prompt, an empty list is not")
        return self.text_encoder(prompts, self.device)

    def condition(self, text: TextEmbedding, seconds_B: Tensor) -> Conditioning:
        """Conditions from text embeddings (B, up to max_length, D) and durations in seconds (B,)."""
        prompt_BLD, mask_BL = self.conditioners["prompt"](text)
        seconds_B1D = self.conditioners["seconds_total"](seconds_B.to(self.device))
        return Conditioning(torch.cat((prompt_BLD, seconds_B1D), dim=1), seconds_B1D[:, 0], mask_BL)

    def forward(self, prompts: Sequence[str], seconds: Sequence[float] | Tensor) -> Conditioning:
        """`condition` of `encode_prompts`."""
        seconds_B = to_device(torch.as_tensor(seconds, dtype=torch.float32), self.device)
        return self.condition(self.encode_prompts(prompts), seconds_B)
