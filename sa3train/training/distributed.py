"""Several ranks as one: launching, communication, and sharding the frozen base (FSDP).

Every base weight is sharded by torch's `fully_shard` and gathered while its layer runs. Adapters, their gradients and
their optimizer state are ordinary tensors, so checkpoints, EMA and resuming are the same as with DDP.

Shape legend: B clips of this rank, C latent channels, T frames.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from sa3train.core.errors import ConfigError, SA3Error
from sa3train.training.quantization import MIN_SIZE, list_weight_users

Result = TypeVar("Result")


def count_started_ranks() -> int:
    """Count the ranks that a launcher says it started: torchrun, SLURM's srun, or MPI.

    Returns:
        The number of ranks; 1 without a launcher.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if "SLURM_PROCID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return int(os.environ.get("SLURM_NTASKS", "1"))
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", "1")))


def check_world_size(expected: int) -> None:
    """Check that as many ranks were started as are to train together.

    More would each train their own adapter into one run folder; fewer would wait for the others forever.

    Args:
        expected: Ranks that are to train together.

    Raises:
        ConfigError: More or fewer were started.
    """
    started = count_started_ranks()
    if started > expected:
        raise ConfigError(
            f"{started} ranks were started but {expected} would train together, so separate adapters would be trained "
            f"into one run folder. Set trainer.devices to the ranks per node and trainer.num_nodes to the nodes "
            f"(devices x num_nodes = {started}), or start one rank."
        )
    if started < expected:
        raise ConfigError(
            f"trainer.devices x trainer.num_nodes asks for {expected} ranks, but {started} is running. Start them with "
            f"launch/torchrun.sh or launch/slurm.sbatch, or set trainer.devices=1 and trainer.num_nodes=1."
        )


def join_ranks(gpu: bool) -> None:
    """Join the other ranks before anything is read or written; alone, do nothing.

    Lightning finds the process group and uses it.

    Args:
        gpu: Whether training runs on GPUs.
    """
    if count_started_ranks() == 1 or dist.is_initialized():
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


def run_on_rank_zero(function: Callable[[], Result]) -> Result:
    """Run a function on rank 0 only.

    Args:
        function: The function.

    Returns:
        Its result, on every rank; every rank raises its `SA3Error`.
    """
    if not _is_distributed():
        return function()
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [function()]
        except SA3Error as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    if isinstance(answer[0], SA3Error):
        raise answer[0]
    return cast(Result, answer[0])


def run_on_rank_zero_first(function: Callable[[], Result]) -> Result:
    """Run a function on every rank, on rank 0 before the others, so that they find what it wrote to a cache.

    Args:
        function: The function.

    Returns:
        This rank's result.
    """
    if not _is_distributed():
        return function()
    if dist.get_rank() > 0:
        dist.barrier()
    try:
        return function()
    finally:
        if dist.get_rank() == 0:
            dist.barrier()


def couple_across_ranks(data_BCT: Tensor, noise_BCT: Tensor, match: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Couple noise with the clips of all ranks.

    Ranks whose batches differ in shape couple among their own clips only.

    Args:
        data_BCT: Latents of this rank.
        noise_BCT: Noise of this rank.
        match: Chooses the noise for each clip, as `diffusion.objective.match_noise` does.

    Returns:
        The noise for each clip of this rank, (B, C, T).
    """
    if _is_distributed():
        shape = torch.tensor(data_BCT.shape, device=data_BCT.device)
        if all(torch.equal(shape, other) for other in _gather(shape)):
            # In the order one rank would have the rows: the loader deals them to ranks in turn.
            data, noise = (torch.stack(_gather(local), dim=1).flatten(0, 1) for local in (data_BCT, noise_BCT))
            return noise[match(data, noise)][dist.get_rank() :: dist.get_world_size()]
    return noise_BCT[match(data_BCT, noise_BCT)] if len(data_BCT) > 1 else noise_BCT


def _gather(local: Tensor) -> list[Tensor]:
    """The tensors of all ranks, which have the same shape."""
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.contiguous())
    return parts


def get_rank_and_world_size() -> tuple[int, int]:
    """Get the position of this process.

    Returns:
        This rank, and the number of ranks that train together.
    """
    return (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum values over all ranks.

    Args:
        values: Of this rank; changed in place.

    Returns:
        The sums.
    """
    if _is_distributed():
        dist.all_reduce(values)
    return values


def all_reduce_max(number: int, device: torch.device) -> int:
    """Take the maximum over all ranks.

    Args:
        number: Of this rank.
        device: Device of this rank.

    Returns:
        The maximum.
    """
    if not _is_distributed():
        return number
    value = torch.tensor(number, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class ShardedBaseStrategy(DDPStrategy):
    """DDP without its wrapper: the base is sharded, and the adapter's gradients are averaged before each step."""

    strategy_name = "sharded_base"

    def configure_ddp(self) -> None:
        """Shard instead of wrapping."""
        module = self.lightning_module
        assert module is not None
        shard_base(module)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients over ranks in one message.

        Args:
            parameters: Whose gradients to average.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def shard_base(root: nn.Module) -> None:
    """Shard every large frozen Linear and Conv1d weight over all ranks; trainable parameters stay whole.

    Args:
        root: The model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(root.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer, weight in list_weight_users(root):
        if weight.numel() >= MIN_SIZE and not weight.requires_grad:
            whole = {parameter for parameter in layer.parameters() if parameter is not weight}
            # Each layer is its own root, and by default roots stay unsharded after a forward pass.
            fully_shard(layer, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
