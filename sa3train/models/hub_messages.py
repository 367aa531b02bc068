"""Why a model is missing, by an unknown name or a failed download, and what to do about it."""

from collections.abc import Iterable

from sa3train.core.errors import CheckpointError
from sa3train.core.text import suggest_name

HUB = "https://huggingface.co"


def explain_failure(repo_id: str, what: str, error: Exception, at_hand: str, offer: str) -> CheckpointError:
    """Explain why a download failed, with what to do.

    Args:
        repo_id: Repository.
        what: What was asked for.
        error: What the hub's library raised.
        at_hand: Sentence on what needs no network.
        offer: Sentence on what needs no account, after a space; empty where there is nothing.

    Returns:
        The error to raise.
    """
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import httpx  # the HTTP library that this version of the hub uses

    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    page, status = f"{HUB}/{repo_id}", getattr(getattr(cause, "response", None), "status_code", None)
    log_in = "log in with `hf auth login` (or set HF_TOKEN to a token of that account)"
    if isinstance(cause, errors.GatedRepoError):
        return CheckpointError(
            f"{repo_id} is gated: accept its license at {page}, then {log_in} and run again. "
            f"If you have the files already, give their folder instead of the name.{offer}"
        )
    no_access = errors.RepositoryNotFoundError | errors.DisabledRepoError | UnicodeEncodeError  # the last: of the token
    if isinstance(cause, no_access) or status in (401, 403):
        return CheckpointError(
            f"the hub does not show {repo_id}: it may be private or gated, or the token may be wrong. "
            f"See {page}, then {log_in}, or give a local folder.{offer}"
        )
    if status == 404:
        return CheckpointError(f"{repo_id} has no {what}. See {page}, or give a local folder.")
    if status == 429:
        return CheckpointError(
            f"the hub has received too many requests from here. Wait some minutes, or {log_in}, then run the same "
            f"command again; complete files are kept. {at_hand}"
        )
    no_answer = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx.ConnectError, httpx.ProxyError)
    if isinstance(cause, (*no_answer, httpx.ConnectTimeout, httpx.UnsupportedProtocol)):
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{cause}".partition("\n")[0]
        return CheckpointError(
            f"{what} of {repo_id} is not in the cache and the hub cannot be reached ({reason}). "
            f"Connect and run again, or give a local folder. {at_hand}"
        )
    reason = f"{cause}".strip().partition("\n")[0].rstrip(".") or type(cause).__name__
    return CheckpointError(
        f"downloading {what} of {repo_id} failed: {reason}. Check the connection and the free disk space, then run "
        f"the same command again; complete files are kept. Or give a local folder. {at_hand}"
    )


def explain_unknown_name(name: str, known: Iterable[str]) -> CheckpointError:
    """Explain that a name is neither known nor a folder, with the closest name and the list.

    Args:
        name: What was given.
        known: Names of the registry.

    Returns:
        The error to raise.
    """
    known = list(known)
    guess = suggest_name(name.lower(), known)
    return CheckpointError(
        f"no model called '{name}' and no folder of that name. {f'{guess} ' if guess else ''}"
        f"Known names: {', '.join(known)}; or give a folder with model_config.json and model.safetensors, a folder "
        f"or repository of diffusers with model_index.json, or packs of the MLX builds. "
        f"sa3-generate --list-models shows which are at hand."
    )
