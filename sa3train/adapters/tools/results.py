"""Results of the tools that write something, as `sa3-adapter` prints them and the studio shows them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sa3train.adapters.adapter import Adapter
from sa3train.adapters.apply.load_report import LoadReport
from sa3train.adapters.tools.low_rank import ErrorByLayer


@dataclass(frozen=True)
class EditResult:
    """An adapter that was written.

    Attributes:
        target: The file or folder.
        adapter: What it holds.
        notes: What was done.
        warnings: What may make it sound different than intended.
        truncation: What truncation to a rank lost; None where nothing was truncated.
        written: How far what was written is from what it was made of, rounding included, found by reading it again.
        measured: What `written` compares: "file", the weights' change, or "tensors", where there is no base model.
        not_carried: What the format cannot hold, besides what the truncation lost.
    """

    target: str | Path
    adapter: Adapter
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()
    truncation: ErrorByLayer | None = None
    written: ErrorByLayer = field(default_factory=ErrorByLayer)
    measured: str = "file"
    not_carried: Sequence[str] = ()

    @property
    def error(self) -> ErrorByLayer:
        """The larger of the two errors."""
        return max(self.truncation or self.written, self.written, key=lambda error: error.relative)

    @property
    def facts(self) -> dict[str, str]:
        """Type, rank, number of layers and error, by name."""
        spec, paths = self.adapter.spec, self.adapter.tensors
        facts = {"adapter type": spec.adapter_type, "rank": spec.format_rank(paths), "layers": str(len(paths))}
        if self.truncation is None:
            return facts | {f"relative error of the written {self.measured}, rounding included": self.written.summary}
        lost = {"truncation error": self.truncation.summary}
        return facts | lost | {f"error of the written {self.measured} besides, by rounding": self.written.summary}

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values for JSON.

        Returns:
            The result by name.
        """
        spec, paths, error = self.adapter.spec, self.adapter.tensors, self.error
        return {
            "written": os.fspath(self.target),
            "adapter_type": spec.adapter_type,
            "rank": spec.format_rank(paths),
            "layers": len(paths),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "error": error.relative,
            "worst_layer": dict(zip(("layer", "error"), error.worst, strict=True)),
            "not_carried": [*self.not_carried, *(self.truncation.not_carried if self.truncation else [])],
        }


@dataclass(frozen=True)
class CheckpointResult:
    """A checkpoint that was written with adapters merged into its weights.

    Attributes:
        target: The folder.
        model: Name of the model that they were merged into.
        reports: How each adapter fits the model.
        strengths: The strength of each.
        rounding: How far what was written is from the merged weights, by the dtype that they are written in.
        not_carried: What the layout cannot hold.
    """

    target: str | Path
    model: str
    reports: Sequence[LoadReport]
    strengths: Sequence[float]
    rounding: ErrorByLayer = field(default_factory=ErrorByLayer)
    not_carried: Sequence[str] = ()

    @property
    def facts(self) -> dict[str, str]:
        """The model, the number of adapters and what rounding loses, by name."""
        facts = {"checkpoint": self.model, "merged adapters": str(len(self.reports))}
        return facts | ({"rounding error of the written weights": self.rounding.summary} if self.reports else {})

    @property
    def notes(self) -> list[str]:
        """How each adapter fits the model, and its strength."""
        pairs = zip(self.reports, self.strengths, strict=True)
        return [f"{report.source}: merged at strength {strength:g}; {report.summary}" for report, strength in pairs]

    @property
    def warnings(self) -> list[str]:
        """What may make the checkpoint sound different than intended."""
        found = [f"{report.source}: {text}" for report in self.reports for text in report.warnings]
        return found + [f"not carried over: {what}" for what in self.not_carried]

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values for JSON.

        Returns:
            The result by name.
        """
        reports = [report.to_dict() for report in self.reports]
        facts = {"reports": reports, "strengths": list(self.strengths), "not_carried": list(self.not_carried)}
        facts["error"] = self.rounding.relative
        return {"written": os.fspath(self.target), **facts}
