from .run_files import RunFiles as RunFiles
from .run_files import read_metrics as read_metrics
from .run_files import read_run as read_run
from .run_report import write_report as write_report
from .verdict import summarize_run as summarize_run
