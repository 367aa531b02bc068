from .coreml import export_coreml as export_coreml
from .onnx_files import export_onnx as export_onnx
from .package import ExportResult as ExportResult
