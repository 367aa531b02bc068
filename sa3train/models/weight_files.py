"""Weight files: names and shapes, reading straight to a device and dtype, writing, and fingerprints of weights.

`WeightFiles` gives the tensors of a checkpoint their released names, whatever layout they are stored in: the released
one is read by `open_weight_file`, that of diffusers by `sa3train.models.diffusers_layout.open_pipeline`, that of the
MLX builds by `sa3train.models.mlx_layout.open_packs`.
"""

import base64
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sa3train.core.dtypes import SAFETENSORS_DTYPES
from sa3train.core.errors import CheckpointError, SA3Error
from sa3train.core.files import get_cache_dir, write_json, write_text
from sa3train.core.log import get_logger
from sa3train.core.safetensors_file import hash_tensors, write_tensors
from sa3train.core.text import list_few
from sa3train.models.npz_file import iterate_npz
from sa3train.models.parse import complete_config

logger = get_logger(__name__)

_SAMPLED, _SAMPLES, _SPREAD = 64, 4, 7919  # at least so many matrices, values of each, and a prime to spread them
_RELEASE_AFTER = 256 * 1024**2  # bytes of a mapped file that may stay in memory while it is converted


def read_tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes.

    Args:
        path: Safetensors file.

    Returns:
        Shapes by name.

    Raises:
        CheckpointError: The file is missing, truncated, not safetensors, or has tensors of another dtype.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            odd = {
                name: part.get_dtype() for name, part in slices.items() if part.get_dtype() not in SAFETENSORS_DTYPES
            }
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing. Copy or download it again.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}). It may be truncated: download or copy it again."
        ) from error
    if odd:
        name, dtype = next(iter(odd.items()))
        raise CheckpointError(f"{path}: {name} is {dtype}; weights must be F32, BF16 or F16. Use the released file.")
    return shapes


@dataclass(frozen=True)
class StoredTensor:
    """Where the values of a tensor are.

    Attributes:
        shape: Its shape.
        file: File that holds it.
        key: Its name in the file.
        convert: Makes the tensor of the file's; None where it is the same.
        constant: The value of a tensor that the layout leaves out because it is the same in every model.
    """

    shape: tuple[int, ...]
    file: Path
    key: str = ""
    convert: Callable[[Tensor], Tensor] | None = None
    constant: Tensor | None = None


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a checkpoint by their released names.

    Attributes:
        path: The file or folder, for messages.
        tensors: Where each tensor is.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {name: stored.shape for name, stored in self.tensors.items()}

    def iterate(
        self, names: Iterable[str], device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Iterate tensors, in the order of `names`.

        Args:
            names: Names of the tensors.
            device: Where they go.
            dtype: Their dtype; None keeps that of the file.

        Yields:
            Name and tensor.
        """
        for file, group in itertools.groupby(names, lambda name: self.tensors[name].file):
            wanted = list(group)
            keys = [self.tensors[name].key for name in wanted if self.tensors[name].constant is None]
            values = iterate_tensors(file, keys, device, dtype)
            for name in wanted:
                stored = self.tensors[name]
                if stored.constant is not None:
                    yield name, stored.constant.to(device, dtype)
                    continue
                tensor = next(values)[1]
                yield name, tensor if stored.convert is None else stored.convert(tensor)

    def compute_fingerprint(self, prefixes: tuple[str, ...], strip: str = "") -> str:
        """Compute the fingerprint of some tensors, see the function of that name. Cached while the files stay.

        Args:
            prefixes: Beginnings of their names.
            strip: What to leave out at the beginning of the names.

        Returns:
            Hex SHA-256.
        """
        names = sorted(name for name in self.tensors if name.startswith(prefixes))

        def compute() -> str:
            tensors = self.iterate(names, "cpu", torch.bfloat16)
            return compute_fingerprint((name.removeprefix(strip), tensor) for name, tensor in tensors)

        files = sorted({self.tensors[name].file for name in names})
        return cache_fingerprint(files, ",".join(prefixes), compute)

    def sample(self, prefixes: tuple[str, ...]) -> str:
        """Sample values of matrices, by which copies of one model in other precisions know each other. Cached.

        Args:
            prefixes: Beginnings of the matrices' names.

        Returns:
            Text for `are_rounded_alike`.
        """
        matrices = {name for name, stored in self.tensors.items() if len(stored.shape) == 2}
        names = sorted(name for name in matrices if name.startswith(prefixes))
        chosen = names[:: max(1, len(names) // _SAMPLED)]

        def compute() -> str:
            values = [
                tensor.flatten()[torch.arange(_SAMPLES) * _SPREAD % tensor.numel()].float()
                for _, tensor in self.iterate(chosen)
            ]
            return base64.b64encode(torch.cat(values).numpy().astype("<f4").tobytes()).decode()

        files = sorted({self.tensors[name].file for name in chosen})
        return cache_fingerprint(files, f"sample {','.join(prefixes)}", compute)


def are_rounded_alike(first: str, second: str) -> bool:
    """Tell whether two samples are of the same weights, each in fp32, fp16 or bf16.

    Args:
        first: From `WeightFiles.sample`.
        second: From the same matrices.

    Returns:
        Whether every value is within what rounding makes of it: 2⁻⁸ of the value, or 2⁻²⁴ near zero.
    """
    try:
        a, b = (np.frombuffer(base64.b64decode(each, validate=True), "<f4") for each in (first, second))
    except ValueError:  # the text of a file that anyone may have written
        return False
    return a.shape == b.shape and bool(np.all(np.abs(a - b) <= 2.0**-8 * np.maximum(np.abs(a), np.abs(b)) + 2.0**-24))


def open_weight_file(path: Path) -> WeightFiles:
    """Open a file of the released layout.

    Args:
        path: Safetensors file.

    Returns:
        Its tensors. `CheckpointError` is raised as by `read_tensor_shapes`.
    """
    shapes = read_tensor_shapes(path)
    return WeightFiles(path, {name: StoredTensor(shape, path, name) for name, shape in shapes.items()})


def reorder_rows(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """Put equal parts of a tensor's first dimension in another order.

    Args:
        tensor: The tensor, whose rows divide into as many parts as `order` has entries.
        order: Index of the part that comes first, second, ….

    Returns:
        A copy.
    """
    parts = tensor.chunk(len(order))
    return torch.cat([parts[index] for index in order])


def iterate_tensors(
    path: Path, names: Iterable[str], device: torch.device | str, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Iterate tensors of a file.

    A CPU tensor that is in `dtype` already stays a view of the mapped file (copied only where written to), so loading
    costs no memory of its own. The file is mapped anew every 256 MiB, so only what is kept of it stays in memory. An
    .npz file cannot be mapped: its arrays are read one by one.

    Args:
        path: Safetensors or .npz file.
        names: Names of the tensors.
        device: Where they go.
        dtype: Their dtype; None keeps that of the file.

    Yields:
        Name and tensor.
    """
    target = torch.device(device)
    if path.suffix == ".npz":
        yield from ((name, tensor.to(target, dtype)) for name, tensor in iterate_npz(path, names))
        return
    pending = list(names)
    while pending:
        seen, done = 0, 0
        with safe_open(path, framework="pt") as file:
            for name in pending:
                tensor = file.get_tensor(name)
                converted = tensor.to(target).to(dtype or tensor.dtype)
                seen += tensor.nbytes
                del tensor
                yield name, converted
                done += 1
                if seen >= _RELEASE_AFTER:
                    break
        pending = pending[done:]


def check_tensor_names(path: Path, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Check that a checkpoint has the tensors of the architecture that its config describes.

    Args:
        path: The file or folder, for messages.
        found: Shapes by name in the file.
        expected: Shapes by name of the architecture.

    Raises:
        CheckpointError: They differ; the message lists how.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    shapes = [
        f"{name} (file {list(found[name])}, expected {list(shape)})"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{len(names)} {what}: {list_few(names, 5)}"
        for names, what in ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{path} is not the model that its config describes ({len(found)} tensors, "
            f"{len(expected)} expected). {'; '.join(problems)}. Take all files from one repository."
        )


def write_checkpoint(folder: Path, config: dict[str, Any], state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write a checkpoint in the released layout: `model_config.json` and `model.safetensors`, each atomically.

    Args:
        folder: Target.
        config: Content of `model_config.json`, which is written with every key.
        state: Tensors under released names.
        dtype: Dtype in the file. Rotary frequencies stay fp32.
    """
    stored = {
        name: tensor.detach().to("cpu", torch.float32 if name.endswith("inv_freq") else dtype).contiguous().clone()
        for name, tensor in state.items()
    }
    write_tensors(folder / "model.safetensors", stored)
    write_json(folder / "model_config.json", complete_config(config, str(folder / "model_config.json")))


def compute_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Compute a fingerprint of names, shapes and values rounded to bf16, so that fp32 and bf16 copies agree.

    Args:
        tensors: Names and tensors, sorted by name. Rotary frequencies are skipped: they are constants, not weights.

    Returns:
        Hex SHA-256.
    """
    parts = (
        (f"{name}{list(tensor.shape)}", tensor.detach().to(device="cpu", dtype=torch.bfloat16))
        for name, tensor in tensors
        if not name.endswith("inv_freq")
    )
    return hash_tensors(itertools.chain.from_iterable(parts))


def cache_fingerprint(paths: Sequence[Path], part: str, compute: Callable[[], str]) -> str:
    """Cache a fingerprint for as long as its files have the same sizes and modification times.

    Args:
        paths: The files.
        part: Which part of them the fingerprint is of.
        compute: Computes it where it is not cached.

    Returns:
        The fingerprint.
    """
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(f"{states}|{part}|2".encode()).hexdigest()
    cached = get_cache_dir() / "fingerprints" / key
    if cached.is_file():
        return cached.read_text(encoding="utf-8")
    found = compute()
    try:
        write_text(cached, found)
    except SA3Error as error:
        logger.debug(f"fingerprint not cached: {error}")
    return found
