"""Caption a folder of audio: what is written and heard, composed by a template. Existing captions are never touched."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sa3train.audio.analysis import analyze_audio
from sa3train.audio.edit import mix_channels
from sa3train.audio.io import read_whole
from sa3train.audio.metrics import is_silent
from sa3train.core.errors import ConfigError, DataError
from sa3train.core.log import track_progress
from sa3train.core.text import list_few
from sa3train.data.audit.audit import READ_ERRORS
from sa3train.data.audit.checks import FINDING_TYPES
from sa3train.data.captioning.captioner import Captioner
from sa3train.data.captioning.compose import Composed, compose_caption
from sa3train.data.captioning.files import Change, Edit, get_caption_path, has_sidecar, save_captions
from sa3train.data.captioning.template import DEFAULT_TEMPLATE, check_template
from sa3train.data.loading.prompts import list_template_fields
from sa3train.data.sources.captions import read_clip_text
from sa3train.data.sources.listing import Clip, list_source
from sa3train.data.sources.names import find_common_words


@dataclass(frozen=True)
class Proposal:
    """A caption for a clip that has none.

    Attributes:
        source: The clip.
        composed: Its caption, and what it was composed of.
        problem: Why there is none; empty where there is one.
    """

    source: str
    composed: Composed
    problem: str = ""


@dataclass(frozen=True)
class CaptionedFolder:
    """What captioning a folder did.

    Attributes:
        proposals: A caption, or the reason why there is none, for each clip that had none.
        kept: Number of clips that had a caption.
        changes: The files written; none in a dry run.
    """

    proposals: list[Proposal]
    kept: int
    changes: list[Change]

    def list_captions(self) -> dict[str, str]:
        """List the composed captions.

        Returns:
            Caption by clip.
        """
        return {one.source: one.composed.caption for one in self.proposals if not one.problem}


def caption_folder(
    folder: str | Path,
    template: str = DEFAULT_TEMPLATE,
    captioner: Captioner | None = None,
    threads: int = 2,
    dry_run: bool = False,
) -> CaptionedFolder:
    """Write a caption beside every clip of a folder that has none; `undo_save` takes it back.

    Args:
        folder: Folder of audio.
        template: Text with fields of `sa3train.data.captioning.compose.CAPTION_VALUES`.
        captioner: A captioning model, for `{description}`.
        threads: Number of clips analyzed at a time.
        dry_run: Write nothing.

    Returns:
        What was composed and written.

    Raises:
        DataError: When `folder` is no folder on disk, or has no audio.
        ConfigError: For a template that cannot be filled.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is not a folder on this machine: captions are written beside its audio.")
    clips = list_source(str(folder)).clips
    bare = [clip for clip in clips if not read_clip_text(clip).caption]
    proposals = list(propose_captions(clips, bare, template, captioner, threads))
    edits = [Edit(one.source, "", one.composed.caption) for one in proposals if not one.problem]
    changes = [] if dry_run else save_captions(folder, clips, edits)
    return CaptionedFolder(proposals, len(clips) - len(bare), changes)


def propose_captions(
    clips: Sequence[Clip],
    wanted: Sequence[Clip],
    template: str = DEFAULT_TEMPLATE,
    captioner: Captioner | None = None,
    threads: int = 2,
) -> Iterator[Proposal]:
    """Compose captions.

    Args:
        clips: All clips of the source: words that most of their names have are left out.
        wanted: Those to caption.
        template: Text with fields.
        captioner: A captioning model; None for none.
        threads: Number of clips analyzed at a time.

    Yields:
        A proposal for each clip, in their order.

    Raises:
        ConfigError: For a template that cannot be filled, or a model that it does not use.
    """
    check_template(template)
    if captioner and "description" not in list_template_fields(template):
        raise ConfigError("a captioning model has no effect without {description} in the template: add it.")
    common = find_common_words(clip.source for clip in clips)
    owners = {path: clip.source for clip in reversed(wanted) if (path := get_caption_path(clip)) is not None}

    def propose(clip: Clip) -> Proposal:
        owner = owners.get(get_caption_path(clip) or "", clip.source)
        if owner != clip.source:
            return Proposal(clip.source, Composed(""), f"its caption file is that of {owner}: rename one of them")
        return _propose_caption(clip, template, common, captioner.describe if captioner else None)

    with ThreadPoolExecutor(1 if captioner else threads) as pool:
        yield from track_progress(pool.map(propose, wanted), "caption", total=len(wanted), unit="clip")


def _propose_caption(
    clip: Clip, template: str, common: frozenset[str], describe: Callable[..., str] | None
) -> Proposal:
    if not has_sidecar(clip):
        return Proposal(clip.source, Composed(""), "it is in an archive, beside which no caption can be written")
    text = read_clip_text(clip)
    if text.unread_caption:
        return Proposal(clip.source, Composed(""), f"it may have a caption: {text.unread_caption}")
    try:
        path = clip.audio.local_path()
        decoded = read_whole(path or clip.audio.read())
        if is_silent(mix_channels(decoded.audio_CN, 2, decoded.speakers)):
            return Proposal(clip.source, Composed(""), FINDING_TYPES["silent"].title)
        sound = analyze_audio(decoded.audio_CN.numpy(), decoded.sample_rate)
        description = describe(decoded.audio_CN, decoded.sample_rate) if describe else ""
    except READ_ERRORS as error:
        return Proposal(clip.source, Composed(""), str(error) or type(error).__name__)
    composed = compose_caption(text, sound, template, common, description)
    return Proposal(clip.source, composed, "" if composed.caption else "no field of the template has a value")


def describe_proposals(done: CaptionedFolder) -> str:
    """Describe in one line what captioning a folder did.

    Args:
        done: The result.

    Returns:
        Such as "captions: 12 composed, 3 kept; without one: broken.wav (unreadable)".
    """
    without = [f"{one.source} ({one.problem.rstrip('.')})" for one in done.proposals if one.problem]
    named = f"; without one: {list_few(without, 5)}" if without else ""
    return f"captions: {len(done.proposals) - len(without)} composed, {done.kept} kept{named}"
