"""Play a model: `Generator.from_pretrained("nano").generate(prompt=...)`."""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.inference.generator import Generator
    from sa3train.inference.outputs import GenerationOutput

__all__ = ["GenerationOutput", "Generator"]
__getattr__ = make_getattr(__name__, {"GenerationOutput": "outputs", "Generator": "generator"})
