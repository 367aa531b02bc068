"""Text embeddings on disk, so that a prompt is encoded once per machine and training loads no text encoder.

    cache = EmbeddingCache(hash_text_encoder(folder, max_length))
    embeddings = cache.get(prompts, encode)      # {prompt: (L, D) tensor}; `encode` is called for missing prompts only

`encode` takes a list of prompts and returns one (L_i, D) tensor each, without padding, in the text encoder's dtype.
Packs are safetensors files that appear whole; several processes may read and write at once. Nothing is changed in
place: deleting the folder only costs time.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sa3train.core.errors import SA3Error
from sa3train.core.files import get_cache_dir
from sa3train.core.log import get_logger
from sa3train.core.safetensors_file import write_tensors
from sa3train.core.user_files import check_content

_logger = get_logger(__name__)

_CHUNK = 16
"""Number of prompts encoded at a time."""

_PACK = 4096
"""Number of prompts in one file."""

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16

Encode = Callable[[list[str]], Sequence[torch.Tensor]]


def hash_text_encoder(folder: str | Path, max_length: int, tokenizer: Path | None = None) -> str:
    """Hash a text encoder: weights, configuration, tokenizer, and number of tokens.

    Of files over 4 MB only the size and 64 pieces are read: other weights differ in all of them.

    Args:
        folder: Folder of the text encoder.
        max_length: Number of tokens it reads.
        tokenizer: Folder of the tokenizer, where it has one of its own.

    Returns:
        Hex SHA-256.
    """
    digest = hashlib.sha256(f"{max_length}".encode())
    for path in sorted(path for each in {Path(folder), tokenizer or Path(folder)} for path in each.iterdir()):
        if path.suffix in (".json", ".safetensors", ".model") and path.is_file():
            size = path.stat().st_size
            digest.update(f"|{path.name}|{size}|".encode())
            with path.open("rb") as file:
                whole = size <= _SAMPLES * _SAMPLE_BYTES
                for piece in range(1 if whole else _SAMPLES):
                    file.seek(piece * (size - _SAMPLE_BYTES) // (_SAMPLES - 1) if not whole else 0)
                    digest.update(file.read(-1 if whole else _SAMPLE_BYTES))
    return digest.hexdigest()


class EmbeddingCache:
    """Embeddings of one text encoder, in packs under the cache folder.

    Attributes:
        folder: Folder of the packs.
    """

    def __init__(self, encoder: str, folder: Path | None = None) -> None:
        """Open a cache.

        Args:
            encoder: What `hash_text_encoder` returned.
            folder: Folder of all text encoders' embeddings; None for the cache folder.
        """
        self.folder = (folder or get_cache_dir() / "text") / encoder[:32]
        self._packs: set[Path] = set()
        self._pack_of: dict[str, Path] = {}

    def get(self, prompts: Iterable[str], encode: Encode, save: bool = True) -> dict[str, torch.Tensor]:
        """Get the embedding of every distinct prompt.

        Args:
            prompts: Prompts.
            encode: Encodes missing prompts.
            save: Save new embeddings; a failure to write is logged only. Set it to False for randomly built prompts,
                which hardly repeat.

        Returns:
            (L, D) tensor on the CPU by prompt.
        """
        wanted = list(dict.fromkeys(prompts))
        found = self.load(wanted)
        missing = [prompt for prompt in wanted if prompt not in found]
        for start in range(0, len(missing), _PACK):
            fresh: dict[str, torch.Tensor] = {}
            pack = missing[start : start + _PACK]
            for first in range(0, len(pack), _CHUNK):
                chunk = pack[first : first + _CHUNK]
                for prompt, hidden_LD in zip(chunk, encode(chunk), strict=True):
                    fresh[prompt] = hidden_LD.detach().cpu().contiguous()
            if save:
                self.save(fresh)
            found |= fresh
        return found

    def load(self, prompts: Iterable[str]) -> dict[str, torch.Tensor]:
        """Load embeddings from disk. Damaged packs are skipped with a warning.

        Args:
            prompts: Prompts.

        Returns:
            (L, D) tensor by prompt, of those that are on disk.
        """
        wanted = {_hash_prompt(prompt): prompt for prompt in prompts}
        self._list_new_packs()
        by_pack: dict[Path, list[str]] = {}
        for name in wanted:
            if name in self._pack_of:
                by_pack.setdefault(self._pack_of[name], []).append(name)
        found: dict[str, torch.Tensor] = {}
        for path, names in by_pack.items():
            try:
                with safe_open(path, framework="pt") as pack:
                    found |= {wanted[name]: pack.get_tensor(name) for name in names}
            except (OSError, SafetensorError) as error:
                _logger.warning("Skipping damaged text embeddings in %s (%s); delete the file.", path, error)
        return found

    def _list_new_packs(self) -> None:
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._packs):
            self._packs.add(path)
            try:
                check_content(path)
                with safe_open(path, framework="pt") as pack:
                    self._pack_of |= dict.fromkeys(pack.keys(), path)
            except (OSError, SafetensorError) as error:
                _logger.warning("Skipping damaged text embeddings in %s (%s); delete the file.", path, error)

    def save(self, embeddings: Mapping[str, torch.Tensor]) -> None:
        """Save embeddings in a new pack; a failure is logged only.

        Args:
            embeddings: (L, D) tensor by prompt.
        """
        if not embeddings:
            return
        tensors = {_hash_prompt(prompt): hidden_LD for prompt, hidden_LD in embeddings.items()}
        pack = hashlib.sha256("".join(sorted(tensors)).encode()).hexdigest()[:32]
        try:
            write_tensors(self.folder / f"{pack}.safetensors", tensors)
        except SA3Error as error:
            _logger.warning("Cannot save text embeddings: %s", error)


def _hash_prompt(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
