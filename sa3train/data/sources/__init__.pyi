from .captions import ClipText as ClipText
from .captions import read_clip_text as read_clip_text
from .listing import Clip as Clip
from .listing import Listing as Listing
from .listing import list_source as list_source
