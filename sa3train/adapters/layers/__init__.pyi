from .inject import InjectedAdapter as InjectedAdapter
from .peft_layers import SA3LoraLayer as SA3LoraLayer
