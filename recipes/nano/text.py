"""Make nano's tokenizer and its untrained text encoder (T5Gemma's architecture, by transformers)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5GemmaConfig, T5GemmaEncoderModel

from sa3train.models.conditioners import TextEmbedding
from sa3train.models.nano import CONDITION_WIDTH, MAX_TOKENS

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
VOCABULARY_SIZE = 1024
ENCODER = {
    "hidden_size": CONDITION_WIDTH,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "max_position_embeddings": 512,
    "sliding_window": 512,
    "layer_types": ["sliding_attention", "full_attention"],
}
"""Keyword arguments of transformers' config."""


def train_tokenizer(captions: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train byte-level BPE of at most `VOCABULARY_SIZE` tokens, which encodes any text, without BOS and EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", truncation_side="right", **names)


def new_encoder(pieces: int = VOCABULARY_SIZE) -> T5GemmaEncoderModel:
    """Make an untrained encoder for a vocabulary of that size."""
    settings = ENCODER | {"vocab_size": pieces}
    config = T5GemmaConfig(
        encoder=settings,
        decoder=dict(settings),
        is_encoder_decoder=False,
        vocab_size=pieces,
        dropout_rate=0.0,
        attention_dropout=0.0,
        attn_implementation="eager",  # its soft-capped logits exist in eager alone
    )
    return T5GemmaEncoderModel(config)


def embed(encoder: Any, ids_BL: Tensor, mask_BL: Tensor) -> TextEmbedding:
    """Compute the encoder's hidden states with gradients, zero at padding, as `TextEncoder` does without."""
    hidden_BLD = encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
    return TextEmbedding(torch.where(mask_BL[..., None], hidden_BLD, 0), mask_BL)


class Prompts:
    """Captions as token ids, tokenized once."""

    def __init__(self, tokenizer: Any, captions: list[list[str]]) -> None:
        flat = [text for texts in captions for text in texts]
        ids = iter(tokenizer(flat, add_special_tokens=False, truncation=True, max_length=MAX_TOKENS).input_ids)
        self.ids: list[list[list[int]]] = [[next(ids) for _ in texts] for texts in captions]

    def batch(self, picks: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Return right-padded ids and mask of (clip, caption) pairs."""
        rows = [torch.tensor(self.ids[clip][caption]) for clip, caption in picks]
        ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return ids_BL, torch.arange(ids_BL.shape[1])[None] < lengths[:, None]
