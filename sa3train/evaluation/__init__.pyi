from .attributes import ATTRIBUTES as ATTRIBUTES
from .attributes import Attribute as Attribute
from .classifier import Classifier as Classifier
