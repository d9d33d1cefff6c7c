#!/usr/bin/env bash
# Trains models with learned bits (DiffQ), each with every group size, and ends with one table of all of them (zoo.py), which is OUTPUT too.
#
#     examples/zoo.sh DATASET EPOCHS BATCH LR PENALTY [ARCHS...]
#     examples/zoo.sh mnist5k 10 128 0.05 5 lenet resnet20
#     TRAIN_FLAGS="--amp fp16 --clip-grad-norm 5" BITS_FLAGS="--bits-lr 1e-3" GPUS=1 examples/zoo.sh cifar10 200 128 0.1 5
#
# As in launch.sh, what is finished is skipped and what was interrupted goes on when it is called again, Ctrl-C stops everything, and a
# training that fails does not keep the others from theirs: the table has it as it was at its last epoch. From the environment:
#
#     GROUP_SIZES="4 8 16"  SEEDS="0"
#     BASELINE=1     train every model in full precision too; not if not set
#     GPUS           processes, one on each GPU; 0, one process on the CPU, if not set
#     OUTPUT         the table as CSV; WORKSPACE/zoo.csv if not set
#     WORKSPACE      folder of checkpoints and logs, one folder a training; runs if not set
#     TRAIN_FLAGS    more flags for every training; BITS_FLAGS: for those with learned bits
#     PYTHON         interpreter; python if not set
set -euo pipefail

if [ $# -lt 5 ]; then
  echo "usage: zoo.sh DATASET EPOCHS BATCH LR PENALTY [ARCHS...]; got $# arguments" >&2
  exit 2
fi
dataset=$1 epochs=$2 batch=$3 lr=$4 penalty=$5 archs=("${@:6}")
if [ ${#archs[@]} -eq 0 ]; then
  archs=(wide_resnet mobilenet mobilenetv2 densenet dla dla_simple lenet efficientnet_b0 resnet18_cifar resnet20 senet)
fi
here=$(cd "$(dirname "$0")" && pwd)
. "$here/trainings.sh"
whole_numbers "EPOCHS $epochs" "BATCH $batch" "GPUS ${GPUS:-0}"
use_gpus "${GPUS:-0}"
read -ra seeds <<<"${SEEDS:-0}"
read -ra sizes <<<"${GROUP_SIZES:-4 8 16}"
read -ra bits_flags <<<"${BITS_FLAGS:-}"
folders=()

for seed in "${seeds[@]}"; do
  for arch in "${archs[@]}"; do
    shared=(--arch "$arch" --dataset "$dataset" --epochs "$epochs" --batch-size "$batch" --lr "$lr" --seed "$seed")
    if [ -n "${BASELINE:-}" ]; then
      folders+=("$workspace/$dataset-$arch-fp32-seed$seed")
      train "$dataset-$arch-fp32-seed$seed" "${shared[@]}" || true
    fi
    for size in "${sizes[@]}"; do
      folders+=("$workspace/$dataset-$arch-diffq-g$size-p$penalty-seed$seed")
      train "$dataset-$arch-diffq-g$size-p$penalty-seed$seed" "${shared[@]}" \
        --weights diffq --group-size "$size" --penalty "$penalty" "${bits_flags[@]}" || true
    done
  done
done

status=0
"$python" "$here/zoo.py" --output "${OUTPUT:-$workspace/zoo.csv}" "${folders[@]}" || status=$?
name_failures
exit "$status"
