"""A frozen base that the ranks share between them, with the small adapter whole on each: FSDP where it pays.

Every base weight is sharded by torch's `fully_shard` and gathered while its layer runs. Adapters, their gradients and
their optimizer state are ordinary tensors, so saving, averaging and resuming are those of DDP.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from sa3train.training.quantized import LEAST, users


class ShardedBaseStrategy(DDPStrategy):
    """DDP without its wrapper: the base is sharded, and the adapter's gradients are averaged before each step."""

    strategy_name = "sharded_base"

    def configure_ddp(self) -> None:
        """Shard in place of wrapping."""
        module = self.lightning_module
        assert module is not None
        shard_base(module)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make each parameter's gradient the mean over ranks, in one message."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        together = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(together)
        together /= dist.get_world_size()
        for gradient, mean in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def shard_base(root: nn.Module) -> None:
    """Shard every frozen Linear and Conv1d weight of `root` over all ranks; trainable parameters stay whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(root.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer, weight in users(root):
        if weight.numel() >= LEAST and not weight.requires_grad:
            whole = {parameter for parameter in layer.parameters() if parameter is not weight}
            # Each layer is a root of its own, and roots stay whole after a forward pass unless told otherwise.
            fully_shard(layer, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
