"""Many items, some at a time: each group is generated while the files of the one before are written."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sa3train.errors import RequestError, SA3Error
from sa3train.log import get_logger

if TYPE_CHECKING:
    from sa3train.inference.outputs import GenerationOutput
    from sa3train.inference.request import ModelFacts

_logger = get_logger(__name__)

AUDIO = ("init_audio", "inpaint_audio")
PER_ITEM = ("prompt", "negative_prompt", "duration")


def in_groups(settings: Mapping[str, Any], count: int, at_a_time: int | None) -> list[dict[str, Any]]:
    """Keyword arguments of `Generator.generate` for `count` items, `at_a_time` of them in each group.

    Every group is a batch of its own, with the seed after that of the one before. Lists that do not go together stay
    as they are: to refuse them is the generator's business. Raises `RequestError` for less than one at a time.
    """
    if at_a_time is not None and at_a_time < 1:
        raise RequestError(f"--at-a-time {at_a_time}: at least one item is made at a time.")
    lists = {name for name in PER_ITEM if isinstance(settings.get(name), list)}
    size = at_a_time or count
    if size >= count or any(len(settings[name]) != count for name in lists):
        return [dict(settings)]
    groups = []
    for number, first in enumerate(range(0, count, size)):
        group = dict(settings)
        for name in lists:
            part = settings[name][first : first + size]
            group[name] = part[0] if len(part) == 1 else part
        if "batch_size" in settings:
            group["batch_size"] = min(size, count - first)
        if settings.get("seed", -1) >= 0:
            group["seed"] = settings["seed"] + number
        groups.append(group)
    return groups


def check_groups(groups: Sequence[Mapping[str, Any]], facts: "ModelFacts") -> None:
    """Raise `RequestError` for what the generator would refuse in any group, before the first is made."""
    from sa3train.inference.request import build_request

    for group in groups:
        given: dict[str, Any] = {f"with_{name}": name in group for name in AUDIO}
        build_request(facts, **given, **{name: value for name, value in group.items() if name not in AUDIO})


class Writer:
    """Writes files beside what goes on, in a thread; use as a context manager, which ends once all are written.

    An error in writing is raised at the next `write`, or at the end.
    """

    def __init__(self, subtype: str) -> None:
        self.subtype = subtype
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if self._last is None:
            return
        try:
            self._last.result()
        except SA3Error as unwritten:
            if kind is None:
                raise
            _logger.error("%s", unwritten)  # beside the error that ended it all

    def write(self, result: "GenerationOutput", places: Sequence[Path]) -> None:
        """Keep each item of `result` at its place, with its sidecar, and say so; first comes what was given before."""
        if self._last is not None:
            self._last.result()
        self._last = self._thread.submit(self._write, result, list(places))

    def _write(self, result: "GenerationOutput", places: Sequence[Path]) -> None:
        for path in result.save_at(places, self.subtype):
            item = places.index(path)
            seconds = result.audio[item].shape[1] / result.sample_rate
            print(f"{path}: {seconds:.2f} s, seed {result.seeds[item]}, sidecar {path.stem}.json", flush=True)
