"""Generate audio: `Generator.from_pretrained("nano").generate(prompt=...)`."""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.inference.generator import Generator
    from sa3train.inference.outputs import GenerationOutput
    from sa3train.inference.request import GenerationSettings
    from sa3train.inference.sidecar import read_sidecar

__all__ = ["GenerationOutput", "GenerationSettings", "Generator", "read_sidecar"]
__getattr__ = make_getattr(
    __name__,
    {
        "GenerationOutput": "outputs",
        "GenerationSettings": "request",
        "Generator": "generator",
        "read_sidecar": "sidecar",
    },
)
