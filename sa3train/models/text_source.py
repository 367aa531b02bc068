"""Where a checkpoint's text encoder comes from: beside it, from a pack, or from a repository."""

from dataclasses import dataclass
from pathlib import Path

from sa3train.core.errors import CheckpointError
from sa3train.models.config import TextConfig
from sa3train.models.hub import CONFIG_FILE, TEXT_PACK, CheckpointFiles, fetch_folder


@dataclass(frozen=True)
class TextEncoderSource:
    """Where the text encoder may be, tried in order.

    Attributes:
        folders: Folders.
        repositories: Then pairs of repository and subfolder.
        tokenizer: Folder of the tokenizer, where it has one of its own.
        pack: Then a pack of the MLX builds, which is unpacked.
    """

    folders: tuple[Path, ...]
    repositories: tuple[tuple[str, str], ...]
    tokenizer: Path | None = None
    pack: Path | None = None

    def tokenizer_folder(self) -> Path:
        """Find the folder with the tokenizer. `CheckpointError` is raised as by `folder`.

        Returns:
            The folder.
        """
        return self.tokenizer or self.folder()

    def folder(self) -> Path:
        """Find the folder with the weights and, unless it has its own, the tokenizer, downloading it where needed.

        Returns:
            The folder.

        Raises:
            CheckpointError: It is nowhere, or the download failed.
        """
        for folder in self.folders:
            if _is_complete(folder, self.tokenizer):
                return folder
        if self.pack is not None and self.pack.is_file():
            from sa3train.models.mlx_layout import unpack_text_encoder

            return unpack_text_encoder(self.pack)
        if not self.repositories:
            raise CheckpointError(
                f"the text encoder is not in {self.folders[0]}: config.json, model.safetensors and tokenizer.json "
                f"belong there. Copy that folder together with the checkpoint"
                f"{f', or {self.pack.name} beside the packs' if self.pack is not None else ''}."
            )
        import huggingface_hub

        for repo_id, subfolder in self.repositories:
            config = huggingface_hub.try_to_load_from_cache(repo_id, CONFIG_FILE)
            if isinstance(config, str) and _is_complete(folder := Path(config).parent / subfolder):
                return folder
        problem: CheckpointError | None = None
        for repo_id, subfolder in self.repositories:
            try:
                folder = fetch_folder(repo_id, subfolder)
            except CheckpointError as error:
                problem = problem or error
                continue
            if _is_complete(folder):
                return folder
        raise problem or CheckpointError(f"no text encoder in {self.repositories}")


def find_text_encoder(files: CheckpointFiles, config: TextConfig) -> TextEncoderSource:
    """Find where a text encoder may be: beside the checkpoint, in its repository, or in the one that the config names.

    Args:
        files: The checkpoint.
        config: Its prompt conditioner.

    Returns:
        The candidates.
    """
    if files.is_pipeline:
        return TextEncoderSource((files.folder / "text_encoder",), (), files.folder / "tokenizer")
    pack = files.folder / TEXT_PACK if files.pack is not None else None
    if config.model_path is not None:
        return TextEncoderSource((files.folder / config.model_path,), (), pack=pack)
    subfolder = config.subfolder or ""
    own = files.info.repo_id if files.info is not None else None
    repositories = dict.fromkeys(repo for repo in (own, config.repo_id) if repo)
    return TextEncoderSource((files.folder / subfolder,), tuple((repo, subfolder) for repo in repositories), pack=pack)


def _is_complete(folder: Path, tokenizer: Path | None = None) -> bool:
    has_weights = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    has_tokenizer = any(((tokenizer or folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return has_weights and has_tokenizer and (folder / "config.json").is_file()
