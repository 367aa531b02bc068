"""Stand in for Apple's GPU: tensors that say they are on "mps" and are computed on the CPU, with that device's limits.

A tensor on the stand-in is a CPU tensor of the class `MPSTensor`. Two modes see every call: one moves tensors between
the devices, the other sees each operator that reaches a device. They refuse what Metal refuses: float64, operators that
torch has no kernel for, tensors of two devices in one operator, pinned and asynchronous copies, a CPU generator.

Which operators have a kernel is read from the installed torch's own list, `native_functions.yaml`, in which each kernel
that is registered for MPS is named; torch's MPSFallback.mm adds a few. It does not say for which dtypes.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchgen
import yaml
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("mps", 0)
NO_FLOAT64 = (
    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
    "Please use float32 instead."
)
NO_OPERATOR = (
    "The operator '{}' is not currently implemented for the MPS device. If you want this op to be considered for "
    "addition please comment on https://github.com/pytorch/pytorch/issues/141287 and mention use-case, that resulted "
    "in missing op as well as commit hash 0. As a temporary fix, you can set the environment variable "
    "`PYTORCH_ENABLE_MPS_FALLBACK=1` to use the CPU as a fallback for this op. WARNING: this will be slower than "
    "running natively on MPS."
)
FALLBACKS = {"embedding_renorm_", "linalg_svd", "linalg_svd.U", "col2im", "upsample_nearest3d.vec"}
"""Computed on the CPU without being asked (torch's aten/src/ATen/mps/MPSFallback.mm)."""
CHOSEN_BY_DEVICE = {
    "_scaled_dot_product_flash_attention_for_cpu": "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "_scaled_dot_product_attention_math_for_mps",
    "convolution": "_mps_convolution",
    "convolution_backward": "mps_convolution_backward",
}
"""Operators in which torch looks at the device, as they are called on the CPU, and what they call on MPS."""
COMPOSITES = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
COPIES = ("_to_copy", "copy_")
TAKE_BOTH = (*COPIES, "index.Tensor", "index_put_", "_index_put_impl_")
"""Operators that take tensors of both devices: indices may be on the CPU."""


class MPSTensor(Tensor):
    """A tensor on the stand-in."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)
    is_mps, is_cpu = property(lambda self: True), property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def tolist(self) -> Any:
        return Move.apply(self.detach(), False).tolist()

    def pin_memory(self, *_: Any) -> Any:
        raise RuntimeError("cannot pin 'torch.mps.FloatTensor' only dense CPU tensors can be pinned")


def put(tensor: Tensor) -> Tensor:
    """Put a CPU tensor on the stand-in, without a copy."""
    if tensor.dtype in (torch.float64, torch.complex128):
        raise TypeError(NO_FLOAT64)
    with torch._C._DisableTorchDispatch():
        return tensor if isinstance(tensor, MPSTensor) else Tensor._make_subclass(MPSTensor, tensor)


def put_all(found: Any) -> Any:
    """Put every tensor of an operator's result on the stand-in."""
    return tree_map(lambda leaf: put(leaf) if isinstance(leaf, Tensor) else leaf, found)


class Move(torch.autograd.Function):
    """Copy a tensor to the stand-in or back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, to_device: bool) -> Tensor:
        ctx.to_device = to_device
        with torch._C._DisableTorchDispatch():
            copied = tensor.clone()
        return put(copied) if to_device else copied

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return Move.apply(gradients[0], not ctx.to_device), None


@functools.cache
def list_kernels() -> dict[str, set[str]]:
    """List the dispatch keys of every operator of the installed torch, by name without namespace."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    keys, delegates = {}, {}
    for entry in entries:
        name = entry["func"].partition("(")[0]
        listed = {key.strip() for group in entry.get("dispatch", {}) for key in group.split(",")}
        keys[name] = listed or {COMPOSITES[0]}
        if "structured_delegate" in entry:
            keys[name], delegates[name] = listed, entry["structured_delegate"]
        for made in entry.get("autogen", "").split(", "):
            delegates.setdefault(made, name)
    for name, other in delegates.items():
        keys[name] = keys.get(name, set()) | keys[other]
    return keys


def has_kernel(name: str) -> bool:
    """Tell whether an operator has a kernel for MPS."""
    return name in FALLBACKS or "MPS" in list_kernels().get(CHOSEN_BY_DEVICE.get(name, name), set())


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute an operator as the device would, or refuse it."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    name = func.name().removeprefix("aten::")
    if not any(isinstance(tensor, MPSTensor) for tensor in tensors):
        made = func(*args, **kwargs)  # inside a composite operator on the device, what it makes is there too
        is_number = isinstance(made, Tensor) and made.ndim == 0 and made.dtype is torch.float64
        return put(made) if _running and isinstance(made, Tensor) and not tensors and not is_number else made
    if name not in COPIES and not has_kernel(name):
        key = next((key for key in COMPOSITES if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)), "")
        if key and func not in _running:
            return _compute_composite(func, key, args, kwargs)
        if not key:
            raise NotImplementedError(NO_OPERATOR.format(func.name()))
    if kwargs.get("dtype") is torch.float64 or any(tensor.dtype is torch.float64 for tensor in tensors if tensor.ndim):
        raise TypeError(NO_FLOAT64)
    is_mixed = any(tensor.ndim and not isinstance(tensor, MPSTensor) for tensor in tensors)
    if is_mixed and name not in TAKE_BOTH:
        raise RuntimeError(f"Expected all tensors to be on the same device, mps:0 and cpu ({func.name()})")
    types = [str(argument.type) for argument in func._schema.arguments]
    args = [  # a number of C++'s comes as one of Python's
        torch.tensor(value) if types[place] == "Tensor" and isinstance(value, int | float) else value
        for place, value in enumerate(args)
    ]
    with torch._C._DisableTorchDispatch():
        found = func(*args, **kwargs)
    return put_all(found)


_running: set[Any] = set()


def _compute_composite(func: Any, key: str, args: Any, kwargs: Any) -> Any:
    """Compute an operator from others, each of which is seen."""
    _running.add(func)
    try:
        with Operators():
            if key == COMPOSITES[0]:
                return put_all(func.decompose(*args, **kwargs))
            return put_all(func._op_dk(getattr(torch._C.DispatchKey, key), *args, **kwargs))
    finally:
        _running.discard(func)


class Operators(TorchDispatchMode):
    """See each operator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Devices(TorchFunctionMode):
    """Move tensors where a call says."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.cpu):
            return _move(func, args, kwargs)
        if func is Tensor.backward:
            loss, gradient = args[0], kwargs.get("gradient")
            gradients = (torch.ones_like(loss) if gradient is None else gradient,)
            with self:  # for what autograd functions of the library call; torch's own `backward` would leave the mode
                engine = torch.autograd.Variable._execution_engine
                return engine.run_backward(
                    (loss,), gradients, False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        if func == Tensor.data.__set__ and isinstance(args[0], MPSTensor) != isinstance(args[1], MPSTensor):
            return _replace(*args)
        if func is Tensor.copy_ and isinstance(args[0], MPSTensor) != isinstance(args[1], MPSTensor):
            assert not (kwargs.get("non_blocking") or args[2:3] == (True,)), "asynchronous copies lose data on MPS"
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "mps":
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'mps' device type for generator but found 'cpu'")
        return put_all(func(*args, **kwargs | {"device": "cpu"}))


def _replace(tensor: Tensor, data: Tensor) -> None:
    """Let a tensor or parameter have data on the other device."""
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    new = torch.nn.Parameter(data, tensor.requires_grad) if is_parameter else data.detach()
    torch.utils.swap_tensors(tensor, new)


def _move(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    tensor, *rest = args
    if func is Tensor.cpu:
        rest = ["cpu", *rest]
    if rest and isinstance(rest[0], Tensor):
        rest[:1] = [rest[0].device, rest[0].dtype]
    copy = kwargs.pop("copy", False)
    target, dtype, is_asynchronous, memory_format = torch._C._nn._parse_to(*rest, **kwargs)
    is_here = isinstance(tensor, MPSTensor)
    goes_there = is_here if target is None else target.type == "mps"
    assert is_here == goes_there or not is_asynchronous, "asynchronous copies lose data on MPS (pytorch issue 83015)"
    if is_here and not goes_there:
        tensor = Move.apply(tensor, False)
    layout = {} if memory_format is None else {"memory_format": memory_format}
    with torch._C.DisableTorchFunction():
        tensor = tensor.to(dtype=dtype or tensor.dtype, copy=copy, **layout)
    return Move.apply(tensor, True) if goes_there and not is_here else tensor


@contextlib.contextmanager
def stand_in(memory: int = 16 * 2**30) -> Iterator[None]:
    """Let torch have the stand-in inside the block."""
    patches = {
        "torch.backends.mps.is_available": functools.cache(lambda: True),  # dynamo reads its __wrapped__
        "lightning.fabric.accelerators.mps.MPSAccelerator.is_available": staticmethod(lambda: True),
        "torch.mps.is_available": lambda: True,
        "torch.mps.device_count": lambda: 1,
        "torch.mps.synchronize": lambda: None,
        "torch.mps.empty_cache": lambda: None,
        "torch.mps.recommended_max_memory": lambda: memory,
        "torch.mps.current_allocated_memory": lambda: 2**20,
        "torch.mps.driver_allocated_memory": lambda: 2**21,
    }
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with contextlib.ExitStack() as stack:
            for name, value in patches.items():
                stack.enter_context(mock.patch(name, value))
            stack.enter_context(Operators())
            stack.enter_context(Devices())
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
