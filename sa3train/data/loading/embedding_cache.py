"""Text embeddings on disk, so that a prompt is encoded once on a machine and training loads no text encoder.

    cache = EmbeddingCache(encoder_identity(folder, max_length))
    embeddings = cache.get(prompts, encode)      # {prompt: (L, D) tensor}; `encode` is called for what is missing only

`encode` takes a list of prompts and returns one (L_i, D) tensor each, without padding, in the text encoder's dtype
(`conditioner.encode_prompts(prompts).split()`). Packs are safetensors files that appear whole; several processes may
read and write at once. Nothing is ever changed in place: deleting the folder only costs time.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sa3train.core.errors import SA3Error
from sa3train.core.files import cache_dir, write_tensors
from sa3train.core.log import get_logger

_logger = get_logger(__name__)

CHUNK = 16
"""Prompts encoded at a time."""

PACK = 4096
"""Prompts in one file."""

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16

Encode = Callable[[list[str]], Sequence[torch.Tensor]]


def encoder_identity(folder: str | Path, max_length: int) -> str:
    """A hash of a text encoder's folder (weights, configuration, tokenizer) and of how many tokens are read.

    Of files over 4 MB only the size and 64 pieces are read: other weights differ in all of them.
    """
    digest = hashlib.sha256(f"{max_length}".encode())
    for path in sorted(Path(folder).iterdir()):
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
    """Embeddings of one text encoder, in packs under the cache folder."""

    def __init__(self, encoder: str, folder: Path | None = None) -> None:
        self.folder = (folder or cache_dir() / "text") / encoder[:32]
        self._packs: set[Path] = set()
        self._places: dict[str, Path] = {}

    def get(self, prompts: Iterable[str], encode: Encode, keep: bool = True) -> dict[str, torch.Tensor]:
        """The embedding of every distinct prompt, on the CPU. What is new is encoded and, unless told otherwise, kept
        on disk; a disk that cannot be written costs a warning, not the run. Do not keep prompts that are made at
        random: there is no end of them.
        """
        wanted = list(dict.fromkeys(prompts))
        found = self.load(wanted)
        missing = [prompt for prompt in wanted if prompt not in found]
        for start in range(0, len(missing), PACK):
            fresh: dict[str, torch.Tensor] = {}
            pack = missing[start : start + PACK]
            for place in range(0, len(pack), CHUNK):
                chunk = pack[place : place + CHUNK]
                for prompt, hidden_LD in zip(chunk, encode(chunk), strict=True):
                    fresh[prompt] = hidden_LD.detach().cpu().contiguous()
            if keep:
                self.save(fresh)
            found |= fresh
        return found

    def load(self, prompts: Iterable[str]) -> dict[str, torch.Tensor]:
        """Those of `prompts` that are on disk. A damaged pack is left out, with a warning."""
        wanted = {_name(prompt): prompt for prompt in prompts}
        self._look()
        by_pack: dict[Path, list[str]] = {}
        for name in wanted:
            if name in self._places:
                by_pack.setdefault(self._places[name], []).append(name)
        found: dict[str, torch.Tensor] = {}
        for path, names in by_pack.items():
            try:
                with safe_open(path, framework="pt") as pack:
                    found |= {wanted[name]: pack.get_tensor(name) for name in names}
            except (OSError, SafetensorError) as error:
                _logger.warning("text embeddings in %s are damaged and left out (%s); delete the file.", path, error)
        return found

    def _look(self) -> None:
        """Take in packs that have appeared since the last look."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._packs):
            self._packs.add(path)
            try:
                with safe_open(path, framework="pt") as pack:
                    self._places |= dict.fromkeys(pack.keys(), path)
            except (OSError, SafetensorError) as error:
                _logger.warning("text embeddings in %s are damaged and left out (%s); delete the file.", path, error)

    def save(self, embeddings: Mapping[str, torch.Tensor]) -> None:
        """Keep embeddings in a pack of their own."""
        if not embeddings:
            return
        tensors = {_name(prompt): hidden_LD for prompt, hidden_LD in embeddings.items()}
        pack = hashlib.sha256("".join(sorted(tensors)).encode()).hexdigest()[:32]
        try:
            write_tensors(self.folder / f"{pack}.safetensors", tensors)
        except SA3Error as error:
            _logger.warning("text embeddings are not kept: %s", error)


def _name(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
