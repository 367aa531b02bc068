from .compose import Composed as Composed
from .files import Edit as Edit
from .files import save_captions as save_captions
from .files import undo_save as undo_save
from .service import caption_folder as caption_folder
from .service import propose_captions as propose_captions
from .template import DEFAULT_TEMPLATE as DEFAULT_TEMPLATE
