"""Playing a model: `Generator.from_pretrained("nano").generate(prompt=...)`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sa3train.inference.outputs import GenerationOutput
    from sa3train.inference.pipeline import Generator

__all__ = ["GenerationOutput", "Generator"]


def __getattr__(name: str) -> Any:
    if name == "Generator":
        from sa3train.inference.pipeline import Generator

        return Generator
    if name == "GenerationOutput":
        from sa3train.inference.outputs import GenerationOutput

        return GenerationOutput
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
