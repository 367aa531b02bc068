"""Several ranks as one: who is there, and what they must agree on.

Shape legend: B clips of this rank, C latent channels, T frames.

A frozen base that the ranks share between them, with the small adapter whole on each: FSDP where it pays.

Every base weight is sharded by torch's `fully_shard` and gathered while its layer runs. Adapters, their gradients and
their optimizer state are ordinary tensors, so saving, averaging and resuming are those of DDP.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from sa3train.core.errors import ConfigError, SA3Error
from sa3train.training.quantization import LEAST, users

Result = TypeVar("Result")


def started_ranks() -> int:
    """How many ranks a launcher says it started: torchrun, SLURM's srun, or MPI; 1 when none did."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if "SLURM_PROCID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return int(os.environ.get("SLURM_NTASKS", "1"))
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", "1")))


def check_world(wanted: int) -> None:
    """Raise `ConfigError` unless as many ranks were started as are to train together.

    More would each train an adapter of its own into one folder; fewer would wait for the others for ever.
    """
    started = started_ranks()
    if started > wanted:
        raise ConfigError(
            f"{started} ranks were started but {wanted} would train together, so separate adapters would be trained "
            f"into one folder. Set trainer.devices to the ranks per node and trainer.num_nodes to the nodes "
            f"(devices x num_nodes = {started}), or start one rank."
        )
    if started < wanted:
        raise ConfigError(
            f"trainer.devices x trainer.num_nodes asks for {wanted} ranks, but {started} was started. Start them with "
            f"launch/torchrun.sh or launch/slurm.sbatch, or set trainer.devices=1 and trainer.num_nodes=1."
        )


def join_ranks(gpu: bool) -> None:
    """Meet the other ranks that torchrun or SLURM started, before anything is read or written; alone, do nothing.

    Lightning finds the process group made and uses it.
    """
    if started_ranks() == 1 or dist.is_initialized():
        return
    environment: ClusterEnvironment
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        environment = SLURMEnvironment(auto_requeue=False)
    else:
        environment = TorchElasticEnvironment()
    os.environ["MASTER_ADDR"] = environment.main_address
    os.environ["MASTER_PORT"] = str(environment.main_port)
    if gpu:
        torch.cuda.set_device(environment.local_rank())
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(backend, rank=environment.global_rank(), world_size=environment.world_size())


def on_rank_zero(function: Callable[[], Result]) -> Result:
    """Call `function` on rank 0; every rank gets its result, or raises its user error."""
    if not _several():
        return function()
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = function()
        except SA3Error as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    if answer[1] is not None:
        raise answer[1]
    result: Result = answer[0]
    return result


def on_rank_zero_first(function: Callable[[], Result]) -> Result:
    """Call `function` on every rank, rank 0 before the others, so that what it writes to a cache is there for them."""
    if not _several():
        return function()
    if dist.get_rank() > 0:
        dist.barrier()
    try:
        return function()
    finally:
        if dist.get_rank() == 0:
            dist.barrier()


def couple_across_ranks(data_BCT: Tensor, noise_BCT: Tensor, columns: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The noise for each clip after minibatch coupling over the clips of all ranks: (B, C, T).

    `columns(data, noise)` chooses. Ranks whose batches differ in shape couple among their own clips alone.
    """
    if not _several():
        return noise_BCT[columns(data_BCT, noise_BCT)] if len(data_BCT) > 1 else noise_BCT
    shapes = torch.tensor(data_BCT.shape, device=data_BCT.device)
    gathered = [torch.empty_like(shapes) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, shapes)
    if any(not torch.equal(shapes, other) for other in gathered):
        return noise_BCT[columns(data_BCT, noise_BCT)] if len(data_BCT) > 1 else noise_BCT
    data, noise = gather_rows(data_BCT), gather_rows(noise_BCT)
    chosen = noise[columns(data, noise)]
    return chosen[dist.get_rank() :: dist.get_world_size()]


def gather_rows(local: Tensor) -> Tensor:
    """Rows of all ranks in the order one rank would have them: the loader deals rows to ranks in turn."""
    if not _several():
        return local
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def place() -> tuple[int, int]:
    """This rank and the number of ranks that train together."""
    return (dist.get_rank(), dist.get_world_size()) if _several() else (0, 1)


def summed(values: Tensor) -> Tensor:
    """The sum of `values` over all ranks."""
    if _several():
        dist.all_reduce(values)
    return values


def largest(number: int, device: torch.device) -> int:
    """The largest `number` of all ranks."""
    if not _several():
        return number
    value = torch.tensor(number, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


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
