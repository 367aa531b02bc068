"""Evaluate generated audio: audible attributes (pitch, onsets, decay) and a classifier of instruments."""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.evaluation.attributes import ATTRIBUTES, Attribute
    from sa3train.evaluation.classifier import Classifier

__all__ = ["ATTRIBUTES", "Attribute", "Classifier"]
__getattr__ = make_getattr(
    __name__, {"ATTRIBUTES": "attributes", "Attribute": "attributes", "Classifier": "classifier"}
)
