"""Where the autoencoder runs in chunks: which latent frames each chunk covers, keeps, and has to compute for that."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from sa3train.errors import ConfigError


@dataclass(frozen=True)
class Chunk:
    """Stretches of latent frames: the chunk as the released model runs it (`span`), what of it goes into the result
    (`kept`), and what has to be computed for that (`computed`).
    """

    span: range
    kept: range
    computed: range

    def kept_slice(self, scale: int = 1) -> slice:
        """Where `kept` lies in what was computed, in units of `scale` a frame."""
        first = self.kept.start - self.computed.start
        return slice(first * scale, (first + len(self.kept)) * scale)

    def computed_slice(self) -> slice:
        """Where `computed` lies in the chunk."""
        return slice(self.computed.start - self.span.start, self.computed.stop - self.span.start)


def whole_chunk(frames: int, unit: int) -> Chunk:
    """All frames as one chunk, kept to the end of its last `unit`."""
    return Chunk(range(frames), range(-(-frames // unit) * unit), range(frames))


def chunk_spans(frames: int, chunk_size: int, overlap: int) -> list[range]:
    """The stretches of latent frames that chunked running covers: every `chunk_size - overlap`, the last at the end.

    Raises `ConfigError` when the chunk is not longer than its overlap.
    """
    if not 0 <= overlap < chunk_size:
        raise ConfigError(f"overlap must be at least 0 and below chunk_size, not {overlap} and {chunk_size}")
    if frames <= chunk_size:
        return [range(frames)]
    starts = list(range(0, frames - chunk_size + 1, chunk_size - overlap))
    if starts[-1] + chunk_size != frames:
        starts.append(frames - chunk_size)
    return [range(start, start + chunk_size) for start in starts]


def chunks_of(frames: int, chunk_size: int, overlap: int, reach: int, unit: int) -> list[Chunk]:
    """The chunks of `frames`. Half the overlap is dropped at inner edges, and later chunks overwrite earlier ones.

    A kept frame depends on none further away than `reach`, so the rest of a chunk need not be computed; what is
    computed starts and ends whole `unit`s of frames from the chunk's start, or at its end.
    """
    spans = chunk_spans(frames, chunk_size, overlap)
    starts = [span.start + (overlap // 2 if span.start > 0 else 0) for span in spans]
    return [
        Chunk(span, range(start, stop), _computed(span, start, stop, reach, unit))
        for span, (start, stop) in zip(spans, itertools.pairwise([*starts, frames]), strict=True)
    ]


def _computed(span: range, start: int, stop: int, reach: int, unit: int) -> range:
    first = max(0, start - reach - span.start) // unit * unit
    last = -(-(stop + reach - span.start) // unit) * unit
    return range(span.start + first, min(span.start + last, span.stop))


def computed_frames(chunks: Sequence[Chunk]) -> int:
    """Latent frames computed in all."""
    return sum(len(chunk.computed) for chunk in chunks)
