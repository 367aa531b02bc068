from .comfy_write import write_comfy as write_comfy
from .io import load_adapter as load_adapter
from .io import save_adapter as save_adapter
