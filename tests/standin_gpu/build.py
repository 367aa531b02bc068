"""Builds the stand-in: `runtime.c` and, for every other CUDA function that torch's libraries ask for, a blank one."""

import re
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
ASKING = ("c10_cuda", "torch_cuda", "torch_cuda_linalg", "torch_python", "caffe2_nvrtc")
"""Torch's libraries that are linked with CUDA's."""
STOOD_IN_FOR = re.compile(r"(__cuda|cuda|cublas|cudnn)\w+|cu(?!File)[A-Z]\w+")
"""Runtime, cuBLAS, cuDNN and driver; cuFFT, cuSOLVER, NCCL and so on stay the real ones, and unused."""


def build(folder: Path) -> Path:
    """The library, in `folder`, to be preloaded."""
    by_hand, blank = folder / "runtime.o", folder / "blank.c"
    run("cc", "-c", "-O1", "-fPIC", "-Wall", f"-I{headers()}", "-idirafter", HERE, HERE / "runtime.c", "-o", by_hand)
    known = names("--defined-only", by_hand)
    libraries = [Path(torch.__file__).parent / "lib" / f"lib{name}.so" for name in ASKING]
    asked = {name for name in names("-D", "--undefined-only", *libraries) if STOOD_IN_FOR.fullmatch(name)}
    blank.write_text("\n".join(f"int {name}(void) {{ return 0; }}" for name in sorted(asked - known)))
    # Under the driver's name: dlopen("libcuda.so.1") then finds the library that is preloaded.
    library = folder / "libcuda.so.1"
    run("cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}", by_hand, blank, "-ldl", "-o", library)
    return library


def headers() -> Path:
    """The folder of CUDA's headers, of the wheels that came with torch."""
    found = next(Path(torch.__file__).parents[1].glob("nvidia/*/include/cuda_runtime_api.h"), None)
    assert found is not None, "torch's CUDA wheels have no cuda_runtime_api.h"
    return found.parent


def names(*arguments: str | Path) -> set[str]:
    """Symbols that `nm` lists, without their versions."""
    return {line.split("@")[0] for line in run("nm", "--format=just-symbols", *arguments).split("\n") if line}


def run(*command: str | Path) -> str:
    """What the command printed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
