"""Generates for the page: keeps models loaded, loads the adapters asked for, saves results to the history."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sa3train.adapters.apply.load_report import LoadReport
from sa3train.adapters.formats.run_dir import locate_adapter
from sa3train.inference.checks import check_files
from sa3train.inference.generator import Generator
from sa3train.inference.outputs import GenerationOutput
from sa3train.inference.resolve import ModelFacts
from sa3train.models.hub import find_checkpoint
from sa3train.studio.play.history import Result, make_name, save_results
from sa3train.studio.play.settings import (
    MODEL_SPECIFIC,
    SIBLING_LABEL,
    STRENGTHS_LABEL,
    AdapterSettings,
    PlaySettings,
)
from sa3train.studio.server.folders import load_model_config
from sa3train.studio.server.jobs import Job
from sa3train.studio.server.workspace import Workspace

MAX_LOADED_MODELS = 2
Report = Callable[[str, float], None]


@dataclass(frozen=True)
class ComparisonCell:
    """One generation of a comparison.

    Attributes:
        label: What to call it.
        request: What to generate.
        note: Which of the form's settings it does not use.
    """

    label: str
    request: PlaySettings
    note: str = ""


class Player:
    """Loads models once and generates one request at a time, for the worker's thread.

    Args:
        workspace: The studio's folders.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._loaded: dict[tuple[str, str], Generator] = {}
        self._adapters: dict[tuple[str, str], list[tuple[Any, ...]]] = {}

    def play(self, request: PlaySettings, job: Job) -> list[Result]:
        """Generate and save to the history.

        Args:
            request: What to generate.
            job: The job to report progress to; its cancellation ends the generation.

        Returns:
            The result of each item.
        """
        request = request.resolve(self.workspace)
        output, reports = self._generate(request, job.report_progress)
        job.report_progress("saving", 1.0)
        return save_results(self.workspace, output, {"mode": request.mode, "reports": reports})

    def compare(self, request: PlaySettings, factors: Sequence[float], with_sibling: bool, job: Job) -> list[Result]:
        """Generate a comparison with one seed and save it to the history.

        Args:
            request: What to generate.
            factors: Multipliers of the adapters' strengths.
            with_sibling: Whether to compare with the model's sibling too.
            job: The job to report progress to.

        Returns:
            The result of each cell.
        """
        group = make_name()
        results: list[Result] = []
        cells = plan_comparison(request.resolve(self.workspace), factors, with_sibling)
        for number, cell in enumerate(cells):

            def report(message: str, progress: float, number: int = number, label: str = cell.label) -> None:
                text = f"{number + 1} of {len(cells)}, {label}: {message}"
                job.report_progress(text, (number + progress) / len(cells))

            output, reports = self._generate(cell.request, report)
            report("saving", 1.0)
            facts = {"mode": request.mode, "group": group, "cell": cell.label, "note": cell.note, "reports": reports}
            results += save_results(self.workspace, output, facts, f"{group}-{number:02d}")
        return results

    def check_adapters(self, request: PlaySettings, job: Job) -> list[LoadReport]:
        """Load the adapters of a request on its model.

        Args:
            request: The request.
            job: The job to report progress to.

        Returns:
            The load report of each adapter.
        """
        request = replace(request, adapters=request.resolve_adapters(self.workspace))
        return self._load(request, job.report_progress).stack.reports

    def _generate(self, request: PlaySettings, report: Report) -> tuple[GenerationOutput, list[dict[str, Any]]]:
        generator = self._load(request, report)
        report("encoding" if request.source else "starting", 0.0)

        def report_step(step: int, total: int, sigma: float, denoised_BCT: Tensor) -> None:
            report(f"step {step + 1} of {total}", (step + 1) / (total + 1))

        output = generator.generate_from(request.settings, callback=report_step)
        return output, [{"summary": one.summary, "warnings": one.warnings} for one in generator.stack.reports]

    def _load(self, request: PlaySettings, report: Report) -> Generator:
        key = (request.model, request.precision)
        if key not in self._loaded:
            report(f"loading {request.model}", 0.0)
            while len(self._loaded) >= MAX_LOADED_MODELS:
                oldest = next(iter(self._loaded))
                del self._loaded[oldest], self._adapters[oldest]
            self._loaded[key] = Generator.from_pretrained(request.model, self.workspace.device, request.precision)
            self._adapters[key] = []
        generator = self._loaded[key] = self._loaded.pop(key)  # the last one used comes last
        identities = [_identify(adapter) for adapter in request.adapters]
        if identities != self._adapters[key]:  # where the same unchanged files are loaded, only strengths are set
            self._adapters[key] = []
            _remove_adapters(generator)
            try:
                for adapter in request.adapters:
                    report(f"loading {Path(adapter.path).name}", 0.0)
                    settings = asdict(adapter) | {"strength": adapter.strengths}
                    del settings["end_strength"]
                    generator.load_adapter(settings.pop("path"), **settings)
            except BaseException:
                _remove_adapters(generator)  # a refused adapter leaves none of the others behind
                raise
            self._adapters[key] = identities
        for index, adapter in enumerate(request.adapters):
            generator.set_strength(adapter.strengths, index, adapter.conditioner_strength)
        return generator


def check_request(workspace: Workspace, request: PlaySettings) -> None:
    """Check a request as its generation will, as far as the model need not be loaded.

    Args:
        workspace: The studio's folders.
        request: What to generate, resolved. An `SA3Error` is raised for what would be refused.
    """
    config = load_model_config(workspace, request.model)
    if config is not None:  # else it is checked when it has been downloaded
        adapters = [
            {"adapter": each.path, "strength": each.strengths, "interval": each.interval} for each in request.adapters
        ]
        check_files([request.settings], ModelFacts.from_config(config, request.model), adapters)


def plan_comparison(request: PlaySettings, factors: Sequence[float], with_sibling: bool) -> list[ComparisonCell]:
    """List what a comparison generates: a row per model, a column per strength.

    Args:
        request: What to generate.
        factors: Multipliers of the adapters' strengths; 0 is the model alone.
        with_sibling: Whether to compare with the model's sibling too.

    Returns:
        The cells, row by row.
    """
    requests = [request, request.switch_to_sibling()] if with_sibling else [request]
    cells = []
    for each in requests:
        for factor in factors if request.adapters else [0.0]:
            label = "no adapter" if factor == 0 else f"strength ×{factor:g}"
            scaled = each.scale_adapters(factor)
            scaled = replace(scaled, settings=replace(scaled.settings, batch_size=1))
            cells.append(ComparisonCell(f"{each.model}, {label}", scaled, _describe_differences(request, each)))
    return cells


def _describe_differences(request: PlaySettings, used: PlaySettings) -> str:
    """What a comparison does not use of the form."""
    own = [name for name in MODEL_SPECIFIC if getattr(request.settings, name) != getattr(used.settings, name)]
    parts = [f"{used.model} uses its own {', '.join(own).replace('_', ' ')}"] if own else []
    parts += ["grids have one variation each"] if request.settings.batch_size > 1 else []
    return "; ".join(parts)


def find_missing_contrast(request: PlaySettings, factors: Sequence[float], with_sibling: bool) -> str | None:
    """Find out why a comparison would have a single cell.

    Args:
        request: What to generate.
        factors: Multipliers of the adapters' strengths.
        with_sibling: Whether to compare with the model's sibling too.

    Returns:
        What to change; None where there is something to compare.
    """
    if len(plan_comparison(request, factors, with_sibling)) > 1:
        return None
    if not request.adapters and not with_sibling:
        sibling = f", or tick {SIBLING_LABEL}" if find_checkpoint(request.model) else ""
        return f"There is nothing to compare. Add an adapter{sibling}."
    return f"{STRENGTHS_LABEL}: one alone is nothing to compare. Give two or more, such as 0, 1."


def _remove_adapters(generator: Generator) -> None:
    for _ in range(len(generator.stack)):
        generator.remove_adapter(0)


def _identify(adapter: AdapterSettings) -> tuple[Any, ...]:
    """What decides whether a loaded adapter can stay."""
    path = locate_adapter(adapter.path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stamps = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return (adapter.path, stamps, adapter.interval, adapter.exclude_layers, adapter.allow_partial)
