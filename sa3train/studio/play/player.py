"""Playing for the page: models kept loaded, adapters as asked for, results into the history."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sa3train.adapters.apply.load_report import LoadReport
from sa3train.inference.generator import Generator
from sa3train.inference.outputs import GenerationOutput
from sa3train.models.hub import REGISTRY
from sa3train.studio.play.history import Entry, keep, new_name
from sa3train.studio.play.request import OWN_OF_A_MODEL, AdapterWish, Wish
from sa3train.studio.server.jobs import Job
from sa3train.studio.server.workspace import Workspace

KEPT_MODELS = 2
Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class Cell:
    """One generation of a comparison: what to call it, what to ask for, and what of the form it leaves out."""

    label: str
    wish: Wish
    note: str = ""


class Player:
    """Loads models once and plays one wish at a time: for one thread, the worker's."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._loaded: dict[tuple[str, str], Generator] = {}
        self._adapters: dict[tuple[str, str], list[tuple[Any, ...]]] = {}

    def play(self, wish: Wish, job: Job) -> list[Entry]:
        """Generate what is asked and keep it. Raises `SA3Error`, or `Cancelled` when `job` was."""
        wish = wish.checked(self.workspace)
        output, reports = self._generate(wish, job.tell)
        job.tell("keeping the result", 1.0)
        return keep(self.workspace, output, {"mode": wish.mode, "reports": reports})

    def compare(self, wish: Wish, factors: Sequence[float], with_sibling: bool, job: Job) -> list[Entry]:
        """The same seed on each strength of its adapters, and on the model's twin too when asked."""
        group, found = new_name(), []
        cells = comparison(wish.checked(self.workspace), factors, with_sibling)
        for number, cell in enumerate(cells):

            def tell(message: str, share: float, number: int = number, label: str = cell.label) -> None:
                text = f"{number + 1} of {len(cells)}, {label}: {message}"
                job.tell(text, (number + share) / len(cells))

            output, reports = self._generate(cell.wish, tell)
            tell("keeping the result", 1.0)
            facts = {"mode": wish.mode, "group": group, "cell": cell.label, "note": cell.note, "reports": reports}
            found += keep(self.workspace, output, facts, f"{group}-{number:02d}")
        return found

    def check(self, wish: Wish, job: Job) -> list[LoadReport]:
        """The load report of each adapter of `wish` on its model. Raises `AdapterError` for one that is refused."""
        arguments = [each.arguments(self.workspace) for each in wish.adapters]
        generator, key = self._generator(wish, job.tell)
        self._equip(generator, key, arguments, job.tell)
        return generator.stack.reports

    def _generate(self, wish: Wish, tell: Tell) -> tuple[GenerationOutput, list[dict[str, Any]]]:
        generator, key = self._generator(wish, tell)
        self._equip(generator, key, [each.arguments(self.workspace) for each in wish.adapters], tell)
        tell("encoding" if wish.source else "starting", 0.0)

        def step(number: int, total: int, sigma: float, denoised_BCT: Tensor) -> None:
            tell(f"step {number + 1} of {total}", (number + 1) / (total + 1))

        output = generator.generate(**wish.arguments(), callback=step)
        reports = [{"summary": one.summary(), "warnings": one.warnings} for one in generator.stack.reports]
        return output, reports

    def _generator(self, wish: Wish, tell: Tell) -> tuple[Generator, tuple[str, str]]:
        key = (wish.model, wish.precision)
        if key not in self._loaded:
            tell(f"loading {wish.model}", 0.0)
            while len(self._loaded) >= KEPT_MODELS:
                oldest = next(iter(self._loaded))
                del self._loaded[oldest], self._adapters[oldest]
            self._loaded[key] = Generator.from_pretrained(wish.model, self.workspace.device, wish.precision)
            self._adapters[key] = []
        self._loaded[key] = self._loaded.pop(key)  # the latest used comes last
        return self._loaded[key], key

    def _equip(self, generator: Generator, key: tuple[str, str], wanted: list[dict[str, Any]], tell: Tell) -> None:
        """Load `wanted`; what is loaded already, from a file that has not changed, only gets its strength."""
        identities = [_identity(each) for each in wanted]
        if identities != self._adapters[key]:
            self._adapters[key] = []
            _bare(generator)
            try:
                for each in wanted:
                    tell(f"loading {Path(each['adapter']).name}", 0.0)
                    generator.load_adapter(**each)
            except BaseException:
                _bare(generator)  # a refused adapter leaves none of the others behind
                raise
            self._adapters[key] = identities
        for number, each in enumerate(wanted):
            generator.set_strength(each["strength"], number, each["conditioner_strength"])


def comparison(wish: Wish, factors: Sequence[float], with_sibling: bool) -> list[Cell]:
    """What a comparison generates, row by row: a row per model, a column per strength; 0 is the model alone."""
    wishes = [wish, wish.on_sibling()] if with_sibling else [wish]
    strengths = factors if wish.adapters else [0.0]
    cells = []
    for each in wishes:
        for factor in strengths:
            label = "no adapter" if factor == 0 else f"strength ×{factor:g}"
            alone = replace(each.at(factor), batch_size=1)
            cells.append(Cell(f"{each.model}, {label}", alone, _left_out(wish, each)))
    return cells


def _left_out(wish: Wish, used: Wish) -> str:
    """What a comparison does not take over from the form."""
    own = [name for name in OWN_OF_A_MODEL if getattr(wish, name) != getattr(used, name)]
    parts = [f"{used.model} uses its own {', '.join(own).replace('_', ' ')}"] if own else []
    parts += ["grids have one take each: variations are left out"] if wish.batch_size > 1 else []
    return "; ".join(parts)


def without_effect(wish: Wish, factors: Sequence[float], with_sibling: bool) -> str | None:
    """Why a comparison of these would compare nothing, or None."""
    if len(comparison(wish, factors, with_sibling)) > 1:
        return None
    if not wish.adapters and not with_sibling:
        twin = " or tick the model's twin" if wish.model in REGISTRY else ""
        return f"there is nothing to compare: add an adapter{twin}."
    return "there is nothing to compare: give two strengths or more."


def _bare(generator: Generator) -> None:
    for _ in range(len(generator.stack)):
        generator.remove_adapter(0)


def _identity(arguments: dict[str, Any]) -> tuple[Any, ...]:
    path = Path(arguments["adapter"])
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stamps = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    rest = tuple(sorted((k, v) for k, v in arguments.items() if k in ("interval", "exclude_layers", "allow_partial")))
    return (str(path), stamps, rest)


def rows_of(wishes: Sequence[AdapterWish]) -> list[dict[str, Any]]:
    """Adapters as rows of the page's rack."""
    return [wish.row() for wish in wishes]
