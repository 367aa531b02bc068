"""Prompt embeddings for training: each prompt is encoded once per machine, then the text encoder is released."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from sa3train.core.device import move_to_device
from sa3train.data.loading.embedding_cache import EmbeddingCache, hash_text_encoder
from sa3train.models.conditioners import Conditioner, TextEmbedding

MAX_RECENT = 4096
"""Random prompts (shuffled or dropped tags) kept in memory."""


class PromptEmbedder:
    """Embeds prompts from memory or disk, and encodes those that are new.

    Args:
        conditioner: Holds the text encoder.
    """

    def __init__(self, conditioner: Conditioner) -> None:
        self.conditioner = conditioner
        encoder = conditioner.text_encoder
        self.cache = EmbeddingCache(
            hash_text_encoder(encoder.source.folder(), encoder.max_length, encoder.source.tokenizer)
        )
        self.known: dict[str, Tensor] = {}
        self.recent: OrderedDict[str, Tensor] = OrderedDict()

    def prepare(self, prompts: Sequence[str]) -> None:
        """Load or encode prompts ahead of training, then release the text encoder if it was needed.

        Args:
            prompts: All prompts known beforehand.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        if missing:
            self.known |= self.cache.get(missing, self._encode)
        self.conditioner.text_encoder.release()

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding:
        """Embed prompts, as `Conditioner.encode_prompts` does.

        Args:
            prompts: The prompts of a batch.

        Returns:
            Their embeddings on the conditioner's device.
        """
        wanted = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        missing = [prompt for prompt in wanted if prompt not in self.recent]
        if missing:
            self.recent |= self.cache.get(missing, self._encode, save=False)
        for prompt in wanted:
            self.recent.move_to_end(prompt)
        embedding = TextEmbedding.join([self.known[p] if p in self.known else self.recent[p] for p in prompts])
        while len(self.recent) > MAX_RECENT:
            self.recent.popitem(last=False)
        device = self.conditioner.device
        return TextEmbedding(move_to_device(embedding.hidden_BLD, device), move_to_device(embedding.mask_BL, device))

    def _encode(self, prompts: list[str]) -> list[Tensor]:
        return self.conditioner.encode_prompts(prompts).split()
