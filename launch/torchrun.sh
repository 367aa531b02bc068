#!/usr/bin/env bash
# Run one training on all GPUs of this machine, or on several machines. Arguments go to sa3-train.
#   bash launch/torchrun.sh data=DIR recipe=style                       every GPU of this machine
#   RANKS=4 bash launch/torchrun.sh …                                   four ranks
#   NODES=2 NODE=0 HEAD=host0 bash launch/torchrun.sh … run_dir=DIR     on each machine, with NODE from 0;
#                                                                       DIR on a disk shared by all machines
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
export PYTHONSAFEPATH=1 # a folder named sa3train here, such as the clone, would hide the package
ranks="${RANKS:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
nodes="${NODES:-1}"
export SA3TRAIN_RUN_STAMP="${SA3TRAIN_RUN_STAMP:-$(date +%Y%m%d-%H%M%S)}"  # one name for all ranks of this machine
if [ "$nodes" -eq 1 ]; then
    meet=(--standalone)
else
    case " $* " in
        *" run_dir="* | *" resume="*) ;;
        *) echo "error: several machines need run_dir=DIR (or resume=DIR) on a disk that all of them share" >&2; exit 1 ;;
    esac
    meet=(--nnodes "$nodes" --node-rank "${NODE:?number of this machine, from 0}"
          --master-addr "${HEAD:?host name of machine 0}" --master-port "${PORT:-29400}")
fi
exec "$python" -m sa3train.cli.ranks "${meet[@]}" --nproc-per-node "$ranks" \
    -m sa3train.cli.train trainer.devices="$ranks" trainer.num_nodes="$nodes" "$@"
