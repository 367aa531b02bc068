"""Find the adapter of a training run: the one of its end, or that of a checkpoint."""

import re
from pathlib import Path

from sa3train.core.errors import AdapterError
from sa3train.core.files import ADAPTER_FILE, FOLDER_FILES, RECORD_FILE, path_exists
from sa3train.core.processes import PROCESS_FILE
from sa3train.core.text import shorten
from sa3train.core.user_files import suggest_path

CHECKPOINTS_DIR = "checkpoints"
_STEP = re.compile(r"(.+)@([0-9]{1,8})", re.DOTALL)
_CHECKPOINT_NAME = re.compile(r"step-(\d{8})\.safetensors")


def locate_adapter(path: str | Path) -> Path:
    """Locate the file of an adapter.

    Args:
        path: A file, a PEFT folder, a run folder, RUN_FOLDER@STEP for the checkpoint of a step, or another folder with
            one adapter file, such as that of a model card.

    Returns:
        The file or PEFT folder.

    Raises:
        AdapterError: If nothing is there, the run has no adapter, or no checkpoint of that step.
    """
    source = Path(path)
    if not path_exists(source):
        if (found := _STEP.fullmatch(str(path))) and path_exists(found[1]):
            return _locate_checkpoint(Path(found[1]), int(found[2]))
        hint = suggest_path(source) or "Give a .safetensors file, a PEFT folder or a run folder."
        raise AdapterError(f"There is no adapter at {shorten(str(source))}. {hint}")
    if not (source / RECORD_FILE).is_file():
        return _find_only_file(source) if source.is_dir() else source
    if not (source / ADAPTER_FILE).is_file():
        raise AdapterError(f"The run {source} has no adapter yet: its first checkpoint writes one.")
    return source / ADAPTER_FILE


def _find_only_file(folder: Path) -> Path:
    """The one adapter file of a folder that is no PEFT folder, such as `sa3-adapter card` writes; else the folder."""
    if any(path_exists(folder / name) for name in FOLDER_FILES):
        return folder
    if (folder / PROCESS_FILE).is_file():
        raise AdapterError(f"The run {folder} has no adapter: it has not begun, or ended before its first step.")
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf") and path.is_file()]
    return files[0] if len(files) == 1 else folder


def get_checkpoint_path(run_dir: Path, step: int) -> Path:
    """Get the path of a checkpoint.

    Args:
        run_dir: The run folder.
        step: Optimizer steps taken.

    Returns:
        The file that holds the state after them.
    """
    return run_dir / CHECKPOINTS_DIR / f"step-{step:08d}.safetensors"


def list_checkpoints(run_dir: Path) -> dict[int, Path]:
    """List the checkpoints of a run.

    Args:
        run_dir: The run folder.

    Returns:
        Files by step, oldest first.
    """
    paths = sorted((run_dir / CHECKPOINTS_DIR).glob("step-*.safetensors"))
    return {int(match.group(1)): path for path in paths if (match := _CHECKPOINT_NAME.fullmatch(path.name))}


def _locate_checkpoint(run_dir: Path, step: int) -> Path:
    path = get_checkpoint_path(run_dir, step)
    if not path.is_file():
        steps = ", ".join(map(str, list_checkpoints(run_dir))) or "none"
        raise AdapterError(
            f"There is no checkpoint of step {step} in {run_dir} (it has: {steps}). "
            f"callbacks.checkpoint.keep_last says how many a run keeps."
        )
    return path
