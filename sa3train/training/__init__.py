"""Train adapters with Lightning: module, loss, callbacks, checkpoints, loggers.

`train` runs a whole training; `sa3-train` calls it with what its configuration names.
"""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.training.loggers import LoggerCollection
    from sa3train.training.module import LoraModule
    from sa3train.training.prompt_embeddings import PromptEmbedder
    from sa3train.training.run import TrainingResult, train
    from sa3train.training.run_dir import RunDir, open_run
    from sa3train.training.settings import TrainingSettings

__all__ = [
    "LoggerCollection",
    "LoraModule",
    "PromptEmbedder",
    "RunDir",
    "TrainingResult",
    "TrainingSettings",
    "open_run",
    "train",
]
__getattr__ = make_getattr(
    __name__,
    {
        "LoggerCollection": "loggers",
        "LoraModule": "module",
        "PromptEmbedder": "prompt_embeddings",
        "RunDir": "run_dir",
        "TrainingResult": "run",
        "TrainingSettings": "settings",
        "open_run": "run_dir",
        "train": "run",
    },
)
