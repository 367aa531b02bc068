"""Several ranks as one: who is there, and what they must agree on.

Shape legend: B clips of this rank, C latent channels, T frames.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from torch import Tensor

from sa3train.errors import ConfigError, SA3Error

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
