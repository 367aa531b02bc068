from .loggers import LoggerCollection as LoggerCollection
from .module import LoraModule as LoraModule
from .prompt_embeddings import PromptEmbedder as PromptEmbedder
from .run import TrainingResult as TrainingResult
from .run import train as train
from .run_dir import RunDir as RunDir
from .run_dir import open_run as open_run
from .settings import TrainingSettings as TrainingSettings
