"""Recorded cases of the released implementation, and where they lie.

The repository keeps every tensor once (`tests/golden/tensors.npz`, an index beside it) and compresses long JSON; on
first use the files are laid out below `GOLDEN` as they were recorded. `python tests/helpers/golden.py FOLDER` packs a
folder of recorded files.
"""

import hashlib
import json
import lzma
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

PACKED = Path(__file__).parents[1] / "golden"
INDEX = "tensors.json.xz"
ARRAYS = "tensors.npz"
LONG_JSON = 32_000  # bytes
DEVICE = os.environ.get("SA3TRAIN_TEST_DEVICE", "cpu")
"""Where recorded cases are computed; `launch/bench_gpu.sh` asks for CUDA."""
DRAWN_SEED, DRAWN_SCALE = 8, 0.3
DRAWN = {
    "same.encode.noisy/audio": (1, 2, 16384),
    "same.encode.8192/audio": (2, 2, 8192),
    "same.encode.28672/audio": (1, 2, 28672),
    "same.encode.49152/audio": (1, 2, 49152),
    "same.encode.chunked/audio": (1, 2, 90112),
}
"""Inputs that were drawn one after the other from one seed, so they need not be stored: name and shape."""


def draw_inputs() -> dict[str, torch.Tensor]:
    """Draw the tensors of `DRAWN`."""
    rng = torch.Generator().manual_seed(DRAWN_SEED)
    return {name: DRAWN_SCALE * torch.randn(shape, generator=rng) for name, shape in DRAWN.items()}


def pack(recorded: Path, packed: Path) -> None:
    """Write every distinct tensor of the safetensors files below `recorded` once, and copy all other files.

    Bytes of equal significance are stored together: the exponents of a tensor compress, its fractions do not.
    """
    arrays, index, drawn = dict[str, np.ndarray](), dict[str, Any](), draw_inputs()
    for path in sorted(p for p in recorded.rglob("*") if p.is_file() and p.suffix != ".npz"):
        name = path.relative_to(recorded).as_posix()
        if path.suffix != ".safetensors":
            (packed / name).parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".json" and path.stat().st_size > LONG_JSON:
                (packed / f"{name}.xz").write_bytes(lzma.compress(path.read_bytes(), preset=9))
            else:
                shutil.copy(path, packed / name)
            continue
        entries = {}
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                tensor = file.get_tensor(key)
                if key in drawn and torch.equal(tensor, drawn[key]):
                    continue
                planes = tensor.contiguous().flatten().view(torch.uint8).numpy() if tensor.dim() else None
                if planes is None:
                    planes = tensor.reshape(1).view(torch.uint8).numpy()
                planes = planes.reshape(-1, tensor.element_size()).T
                digest = hashlib.sha256(planes.tobytes()).hexdigest()[:16]
                arrays[digest] = planes
                entries[key] = [digest, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            index[name] = {
                "metadata": file.metadata(),
                "tensors": entries,
                "drawn": sorted(drawn.keys() & set(file.keys())),
            }
    with zipfile.ZipFile(packed / ARRAYS, "w", zipfile.ZIP_LZMA) as archive:
        for digest, planes in arrays.items():
            with archive.open(f"{digest}.npy", "w") as entry:
                np.save(entry, planes)
    (packed / INDEX).write_bytes(lzma.compress(json.dumps(index, separators=(",", ":")).encode(), preset=9))


def unpack(packed: Path, folder: Path) -> None:
    """Lay the recorded files out in `folder`."""
    drawn = draw_inputs()
    shutil.copytree(packed, folder, ignore=shutil.ignore_patterns("*.xz", ARRAYS), dirs_exist_ok=True)
    for path in (each for each in packed.rglob("*.json.xz") if each.name != INDEX):
        (folder / path.relative_to(packed).with_suffix("")).write_bytes(lzma.decompress(path.read_bytes()))
    with np.load(packed / ARRAYS) as arrays:
        for name, file in json.loads(lzma.decompress((packed / INDEX).read_bytes())).items():
            tensors = {key: drawn[key] for key in file["drawn"]}
            for key, (digest, dtype, shape) in file["tensors"].items():
                data = torch.from_numpy(np.ascontiguousarray(arrays[digest].T).reshape(-1))
                tensors[key] = data.view(getattr(torch, dtype)).reshape(shape)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / name, metadata=file["metadata"])


def prepare_golden() -> Path:
    """Lay the recorded files out once, for every process that asks, and return their folder."""
    version = hashlib.sha256((PACKED / INDEX).read_bytes() + Path(__file__).read_bytes()).hexdigest()[:12]
    folder = PACKED.parents[1] / ".pytest_cache" / f"golden-{version}"
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            unpack(PACKED, Path(made) / "golden")
            try:
                (Path(made) / "golden").rename(folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
    return folder


GOLDEN = prepare_golden()
PLAIN = GOLDEN / "plain"
DIFF = GOLDEN / "diff"


class GoldenSet:
    """Recorded inputs and outputs of the released implementation: an index JSON beside a safetensors file.

    `GoldenSet("plain/cases")` reads `plain/cases.json` and `plain/cases.safetensors` below `GOLDEN`. Tensors keep
    their dtype.
    """

    def __init__(self, name: str) -> None:
        self.stem = GOLDEN / name
        self.cases: dict[str, dict[str, Any]] = json.loads(self.stem.with_suffix(".json").read_text(encoding="utf-8"))

    def names(self, prefix: str) -> list[str]:
        """List the cases whose name starts with `prefix`, in recorded order. Raise `KeyError` when there is none."""
        found = [name for name in self.cases if name.startswith(prefix)]
        if not found:
            raise KeyError(f"no golden case starts with {prefix!r} in {self.stem}")
        return found

    def settings(self, case: str) -> dict[str, Any]:
        """Return the recorded settings of `case`, without its tensor index."""
        return {key: value for key, value in self.cases[case].items() if key != "tensors"}

    def tensors(self, case: str, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Return every tensor of `case` on `device`, by its name within the case."""
        index = self.cases[case]["tensors"]
        with safe_open(self.stem.with_suffix(".safetensors"), framework="pt") as file:
            return {name: file.get_tensor(key).to(device) for name, key in index.items()}

    def tensor(self, key: str) -> torch.Tensor:
        """Return one tensor by its key in the file."""
        with safe_open(self.stem.with_suffix(".safetensors"), framework="pt") as file:
            return file.get_tensor(key)


if __name__ == "__main__":
    pack(Path(sys.argv[1]), PACKED)
