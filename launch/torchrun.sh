#!/usr/bin/env bash
# Train on several GPUs (or CPU ranks), on one machine or several. Arguments go to sa3-train.
#   bash launch/torchrun.sh data=latents model=medium-base                           all GPUs of this machine
#   NPROC=2 bash launch/torchrun.sh trainer=ddp trainer.accelerator=cpu data=latents  two CPU ranks
#   NNODES=2 NODE_RANK=0 HEAD=host0:29500 bash launch/torchrun.sh …                   on host0
#   NNODES=2 NODE_RANK=1 HEAD=host0:29500 bash launch/torchrun.sh …                   on host1
# A rank that dies is started again up to RESTARTS times; the run then goes on from its last state.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
nproc=${NPROC:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 1)}
nodes=${NNODES:-1}
if [ "$nodes" -gt 1 ]; then
    : "${HEAD:?several nodes need HEAD=host:port of the first one}" "${NODE_RANK:?several nodes need NODE_RANK=0, 1, …}"
    meet=(--nnodes "$nodes" --node_rank "$NODE_RANK" --rdzv_backend c10d --rdzv_endpoint "$HEAD")
    run_id=${RUN_ID:?several nodes need a common RUN_ID, which names the run}
else
    meet=(--standalone)
    run_id=${RUN_ID:-$(date +%Y%m%d-%H%M%S)}
fi
# Every rank, and every restart, must agree on the run's folder.
export SA3TRAIN_RUN_STAMP=$run_id
exec .venv/bin/python -m torch.distributed.run "${meet[@]}" --nproc_per_node "$nproc" --rdzv_id "$run_id" \
    --max_restarts "${RESTARTS:-0}" -m sa3train.jobs.train "$@"
