"""Prompt and duration become the conditions of the DiT.

Shape legend: B items, L tokens (at most `max_length`), M = max_length + 1 context tokens, D condition width.
Module names are those of the released files under `conditioner.`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sa3train.errors import CheckpointError
from sa3train.models.blocks import FourierFeatures
from sa3train.models.config import ConditionerConfig, NumberConfig
from sa3train.models.sources import TextEncoderSource


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
        self._tokenizer: Any = None
        self._model: Any = None

    @property
    def loaded(self) -> bool:
        """Whether the encoder's weights are in memory."""
        return self._model is not None

    def release(self) -> None:
        """Give back the encoder's memory; the next use loads it again."""
        self._model = None

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer. Raises `CheckpointError` when its files are missing."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            folder = self.source.folder()
            try:
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except (OSError, ValueError, KeyError) as error:
                raise _unreadable(folder, error) from error
            tokenizer.padding_side = tokenizer.truncation_side = "right"
            self._tokenizer = tokenizer
        return self._tokenizer

    def model(self, device: torch.device) -> Any:
        """The encoder on `device`, in its file's dtype. Raises `CheckpointError` when files are missing or broken."""
        if self._model is None:
            from transformers import T5GemmaConfig, T5GemmaEncoderModel

            folder = self.source.folder()
            if not (folder / "model.safetensors").is_file() and not (folder / "model.safetensors.index.json").is_file():
                raise CheckpointError(
                    f"{folder} holds no model.safetensors for the text encoder. Copy the whole folder."
                )
            try:
                config = T5GemmaConfig.from_pretrained(folder, is_encoder_decoder=False, local_files_only=True)
                with quiet_transformers():
                    loaded: Any = T5GemmaEncoderModel.from_pretrained(
                        folder,
                        config=config,
                        dtype="auto",
                        use_safetensors=True,
                        local_files_only=True,
                        output_loading_info=True,
                    )
            except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
                raise _unreadable(folder, error) from error
            model, info = loaded
            if lacking := sorted(info["missing_keys"]) + [str(each) for each in info["mismatched_keys"]]:
                raise CheckpointError(
                    f"the text encoder in {folder} lacks {len(lacking)} tensors of a T5Gemma encoder, such as "
                    f"{lacking[0]}. Copy the released folder."
                )
            self._model = model.eval().requires_grad_(False)
        return self._model.to(device)

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before truncation; above `max_length` the rest of the prompt goes unread."""
        if not prompts:
            return []
        return [len(ids) for ids in self.tokenizer(list(prompts), add_special_tokens=False).input_ids]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], device: torch.device) -> TextEmbedding:
        """Hidden states of each prompt, as long as the longest (cut at `max_length` tokens)."""
        tokens = self.tokenizer(
            list(prompts),
            add_special_tokens=False,
            truncation=True,
            max_length=self.max_length,
            padding="longest",
            return_tensors="pt",
        )
        ids_BL, mask_BL = tokens.input_ids.long().to(device), tokens.attention_mask.bool().to(device)
        model = self.model(device)
        if ids_BL.shape[1] == 0:
            width = model.config.encoder.hidden_size
            return TextEmbedding(torch.zeros(*ids_BL.shape, width, dtype=model.dtype, device=device), mask_BL)
        hidden_BLD = model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        return TextEmbedding(torch.where(mask_BL[..., None], hidden_BLD, 0), mask_BL)


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
        seconds_B = torch.as_tensor(seconds, dtype=torch.float32, device=self.device)
        return self.condition(self.encode_prompts(prompts), seconds_B)
