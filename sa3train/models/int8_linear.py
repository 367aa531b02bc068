"""Products of 8-bit integers on a CPU, for inference: weights quantized by row, activations by token.

Integers are summed exactly by processors with VNNI; on others sums of two products saturate, which `find_int8_fault`
finds. oneDNN multiplies unsigned activations with signed weights (signed activations run a reference kernel that takes
seconds), so activations have a zero point (Jacob et al. 2018, section 2.1). One scale for all tokens would lose most in
the feed-forward's second product, whose inputs have long tails.
Shape suffixes: T tokens, I columns (in), O rows (out).
"""

import torch
from torch import Tensor, nn

_LARGEST = 127
_ZERO = 128
_INTEGERS = 2.0**23  # from here up to twice of it, fp32 has the integers alone
_TINY = 1e-12  # a scale above zero for rows of zeros
_MAX_ERROR = 0.05  # of a random product, relative; a right one has about 0.01


class Int8Linear(nn.Linear):
    """A linear layer whose product runs on 8-bit integers.

    It keeps the weight and bias of the layer that it replaces, so that adapters find and change them as they do there;
    after a change in place (not by `.data`) the integers are computed again, when they are needed next.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._packed: tuple[int, Tensor, Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        version, packed, scale_O, zero_O = self._packed or (-1, x, x, x)
        if version != self.weight._version:
            version, packed, scale_O, zero_O = self._packed = (self.weight._version, *_pack(self.weight))
        x_TI = x.reshape(-1, x.shape[-1])
        scale_T1 = _find_largest(x_TI).float().clamp_(min=_TINY).div_(_LARGEST)
        # The sum is rounded to an integer, which is its lowest byte; torch converts fp32 to uint8 eight times slower.
        shifted_TI = x_TI.to(torch.float32, copy=True).mul_(scale_T1.reciprocal()).add_(_INTEGERS + _ZERO)
        rounded_TI = shifted_TI.view(torch.int32).to(torch.uint8)
        y_TO: Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded_TI, 1.0, _ZERO, packed, scale_O, zero_O, None, 1.0, 0, x.dtype, "none", [], ""
        )
        scale_T1 = scale_T1.to(x.dtype)
        y_TO = y_TO.mul_(scale_T1) if self.bias is None else torch.addcmul(self.bias, y_TO, scale_T1)
        return y_TO.unflatten(0, x.shape[:-1])


def _find_largest(x_TI: Tensor) -> Tensor:
    """Largest magnitude of each row (T, 1): bits without the sign compare as numbers do, three times as fast."""
    integers, mask = (torch.int32, 0x7FFFFFFF) if x_TI.dtype == torch.float32 else (torch.int16, 0x7FFF)
    return (x_TI.view(integers) & mask).amax(dim=1, keepdim=True).view(x_TI.dtype)


def _pack(W_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight by row and lay it out as oneDNN reads it; scales and zero points follow."""
    exact_OI = W_OI.detach().float()
    scale_O = exact_OI.abs().amax(dim=1).clamp_(min=_TINY).div_(_LARGEST)
    rounded_OI = (exact_OI / scale_O[:, None]).round_().to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(rounded_OI, None)
    return packed, scale_O, torch.zeros(len(scale_O), dtype=torch.int32)


@torch.inference_mode(False)
def find_int8_fault() -> str | None:
    """Find out why this machine and torch do not multiply 8-bit integers.

    Returns:
        The reason; None if a small product is right.
    """
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 32, bias=False, device="meta").to_empty(device="cpu")
    nn.init.normal_(linear.weight, generator=generator)
    x_TI = torch.randn(4, 64, generator=generator)
    with torch.no_grad():
        try:
            exact_TO, found_TO = linear(x_TI), Int8Linear(linear)(x_TI)
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            return str(error).splitlines()[0]
        wrong = (found_TO - exact_TO).norm() / exact_TO.norm()
    return None if wrong < _MAX_ERROR else f"products are wrong by {wrong:.0%}, as on processors without VNNI"


def quantize_linears(module: nn.Module) -> None:
    """Replace the linear layers inside a module, in place, by ones that multiply 8-bit integers.

    Args:
        module: Such as the blocks of a transformer, on a CPU.
    """
    for name, linear in [each for each in module.named_modules() if type(each[1]) is nn.Linear]:
        module.set_submodule(name, Int8Linear(linear))
