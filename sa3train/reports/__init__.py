"""Run folders: their contract (`run_files`), and the HTML report made from them.

Training writes run folders; the report and the studio read them. The charts and tables are shared with the studio.
"""

from typing import TYPE_CHECKING

from sa3train.core.lazy import make_getattr

if TYPE_CHECKING:
    from sa3train.reports.run_files import RunFiles, read_metrics, read_run, summarize_run
    from sa3train.reports.run_report import write_report

__all__ = ["RunFiles", "read_metrics", "read_run", "summarize_run", "write_report"]
__getattr__ = make_getattr(
    __name__,
    {
        "RunFiles": "run_files",
        "read_metrics": "run_files",
        "read_run": "run_files",
        "summarize_run": "run_files",
        "write_report": "run_report",
    },
)
