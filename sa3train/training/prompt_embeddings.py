"""Prompt embeddings for training: each distinct prompt is encoded once on a machine, and the text encoder is let go."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from sa3train.core.device import to_device
from sa3train.data.loading.embedding_cache import EmbeddingCache, encoder_identity
from sa3train.models.conditioners import Conditioner, TextEmbedding

RECENT = 4096
"""Prompts made at random (shuffled or dropped tags) that are kept in memory."""


class PromptBank:
    """Gives embeddings of prompts from memory or disk, encoding those that are new. Called like `encode_prompts`."""

    def __init__(self, conditioner: Conditioner) -> None:
        self.conditioner = conditioner
        encoder = conditioner.text_encoder
        self.cache = EmbeddingCache(encoder_identity(encoder.source.folder(), encoder.max_length))
        self.known: dict[str, Tensor] = {}
        self.recent: OrderedDict[str, Tensor] = OrderedDict()

    def prepare(self, prompts: Sequence[str]) -> None:
        """Have all of `prompts` at hand, then release the text encoder if it was needed."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        if missing:
            self.known |= self.cache.get(missing, self._encode)
        self.conditioner.text_encoder.release()

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding:
        """Embeddings of `prompts` on the conditioner's device."""
        wanted = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        missing = [prompt for prompt in wanted if prompt not in self.recent]
        if missing:
            self.recent |= self.cache.get(missing, self._encode, keep=False)
        for prompt in wanted:
            self.recent.move_to_end(prompt)
        embedding = TextEmbedding.join([self.known[p] if p in self.known else self.recent[p] for p in prompts])
        while len(self.recent) > RECENT:
            self.recent.popitem(last=False)
        device = self.conditioner.device
        return TextEmbedding(to_device(embedding.hidden_BLD, device), to_device(embedding.mask_BL, device))

    def _encode(self, prompts: list[str]) -> list[Tensor]:
        return self.conditioner.encode_prompts(prompts).split()
