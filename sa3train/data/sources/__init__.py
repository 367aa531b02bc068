"""List source clips and read their captions, from local folders, tars, manifests and remote storage."""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.data.sources.captions import ClipText, read_clip_text
    from sa3train.data.sources.listing import Clip, Listing, list_source

__all__ = ["Clip", "ClipText", "Listing", "list_source", "read_clip_text"]
__getattr__ = make_getattr(
    __name__,
    {
        "Clip": "listing",
        "ClipText": "captions",
        "Listing": "listing",
        "list_source": "listing",
        "read_clip_text": "captions",
    },
)
