"""Build the stand-in: `runtime.c`, and an empty function for each other CUDA function that torch's libraries need."""

import re
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
TORCH_LIBRARIES = ("c10_cuda", "torch_cuda", "torch_cuda_linalg", "torch_python", "caffe2_nvrtc")
"""Torch's libraries that are linked against CUDA."""
REPLACED = re.compile(r"(__cuda|cuda|cublas|cudnn)\w+|cu(?!File)[A-Z]\w+")
"""Runtime, cuBLAS, cuDNN and driver; cuFFT, cuSOLVER, NCCL and others stay the real ones, and unused."""


def build(folder: Path) -> Path:
    """Build the library to preload, in `folder`."""
    by_hand, blank = folder / "runtime.o", folder / "blank.c"
    includes = (f"-I{find_headers()}", "-idirafter", HERE)
    run("cc", "-c", "-O1", "-fPIC", "-Wall", *includes, HERE / "runtime.c", "-o", by_hand)
    known = list_symbols("--defined-only", by_hand)
    libraries = [Path(torch.__file__).parent / "lib" / f"lib{name}.so" for name in TORCH_LIBRARIES]
    needed = {name for name in list_symbols("-D", "--undefined-only", *libraries) if REPLACED.fullmatch(name)}
    blank.write_text("\n".join(f"int {name}(void) {{ return 0; }}" for name in sorted(needed - known)))
    # It has the driver's name, so that dlopen("libcuda.so.1") finds the preloaded library.
    library = folder / "libcuda.so.1"
    run("cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}", by_hand, blank, "-ldl", "-o", library)
    return library


def find_headers() -> Path:
    """Find the folder of CUDA's headers in torch's CUDA wheels."""
    header = next(Path(torch.__file__).parents[1].glob("nvidia/*/include/cuda_runtime_api.h"), None)
    assert header is not None, "torch's CUDA wheels have no cuda_runtime_api.h"
    return header.parent


def list_symbols(*arguments: str | Path) -> set[str]:
    """List the symbols that `nm` prints, without their versions."""
    return {line.split("@")[0] for line in run("nm", "--format=just-symbols", *arguments).split("\n") if line}


def run(*command: str | Path) -> str:
    """Run a command and return what it printed."""
    process = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert process.returncode == 0, f"{command}\n{process.stderr}"
    return process.stdout


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
