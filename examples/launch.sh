#!/usr/bin/env bash
# Trains MODEL on DATASET in full precision, then fine-tunes it with low-bit weights: every quantizer, number of bits and seed.
#
#     examples/launch.sh MODEL DATASET EPOCHS BATCH LR GPUS
#     examples/launch.sh resnet20 mnist5k 10 64 0.1 0                  # GPUS 0: one process on the CPU
#     SEEDS="0 1 2 3 4" BITS="2 3 4" examples/launch.sh resnet20 cifar10 164 32 0.1 4
#
# BATCH is that of one process. What is finished is skipped, what was interrupted goes on: call it again with the same arguments. Ctrl-C (or
# SIGTERM) writes a checkpoint and stops everything; a second one kills. A training that fails (its loss is not finite, say) is named at
# the end, the others go on. From the environment:
#
#     SEEDS="0 1 2"  BITS="3 4"  QUANTIZERS="po2 po2plus"
#     QAT_EPOCHS     epochs of fine-tuning; a fifth of EPOCHS if not set
#     QAT_LR         its peak learning rate; a tenth of LR if not set
#     WORKSPACE      folder of checkpoints and logs, one folder a training; runs if not set
#     TRAIN_FLAGS    more flags for every training: "--data-path DATA --weight-decay 5e-4"
#     PYTHON         interpreter; python if not set
set -euo pipefail

if [ $# -ne 6 ]; then
  echo "usage: launch.sh MODEL DATASET EPOCHS BATCH LR GPUS; got $# arguments" >&2
  exit 2
fi
model=$1 dataset=$2 epochs=$3 batch=$4 lr=$5 gpus=$6
for number in "EPOCHS $epochs" "BATCH $batch" "GPUS $gpus"; do
  if ! [[ ${number#* } =~ ^[0-9]+$ ]]; then
    echo "launch.sh: ${number%% *} must be a whole number; got '${number#* }'" >&2
    exit 2
  fi
done
python=${PYTHON:-python}
here=$(cd "$(dirname "$0")" && pwd)
workspace=${WORKSPACE:-runs}
qat_epochs=${QAT_EPOCHS:-$(((epochs + 4) / 5))}
qat_lr=${QAT_LR:-$(awk -v lr="$lr" 'BEGIN { print lr / 10 }')}
read -ra seeds <<<"${SEEDS:-0 1 2}"
read -ra widths <<<"${BITS:-3 4}"
read -ra quantizers <<<"${QUANTIZERS:-po2 po2plus}"
read -ra more <<<"${TRAIN_FLAGS:-}"
if [ "$gpus" -eq 0 ]; then
  launcher=("$python") device=cpu
else
  launcher=("$python" -m torch.distributed.run --standalone "--nproc-per-node=$gpus") device=auto
fi
failed=()

# In the background, so that a signal reaches this script at once and not when the training has ended: the trap passes it on and waits.
child=
stop() {
  trap - INT TERM
  if [ -n "$child" ]; then
    kill -TERM "$child" 2>/dev/null || true
    wait "$child" || true
  fi
  echo "launch.sh: stopped; the same command goes on" >&2
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM

# train CONFIGURATION SEED FLAGS...: 0 if the training has come to its end, now or before; 1 if it failed. Anything else ends the script.
train() {
  local name=$dataset-$model-$1-seed$2 folder=$workspace/$dataset-$model-$1-seed$2 status=0
  local flags=(--arch "$model" --dataset "$dataset" --batch-size "$batch" --seed "$2" "${@:3}" "${more[@]}") resume=()
  mkdir -p "$folder" || exit 1 # said here: set -e does not hold in functions that are asked for their status
  if [ -e "$folder/last.pt" ] && [ "$(cat "$folder/flags")" != "${flags[*]}" ]; then
    printf 'launch.sh: %s was begun with other settings; delete it or choose another WORKSPACE\n  there: %s\n  asked: %s\n' \
      "$folder" "$(cat "$folder/flags")" "${flags[*]}" >&2
    exit 2
  fi
  if [ -e "$folder/done" ] && [ -e "$folder/last.pt" ]; then
    echo "== $name: done"
    return 0
  fi
  echo "${flags[*]}" >"$folder/flags"
  if [ -e "$folder/last.pt" ]; then
    resume=(--resume "$folder/last.pt")
    echo "== $name: goes on"
  else
    echo "== $name"
  fi
  "${launcher[@]}" "$here/train.py" "${flags[@]}" --device "$device" --workspace "$folder" "${resume[@]}" &
  child=$!
  wait "$child" || status=$?
  child=
  case $status in
    0) touch "$folder/done" ;;
    1) failed+=("$name") && return 1 ;;
    *) exit "$status" ;; # bad flags, a signal: the next training would fare no better
  esac
}

for seed in "${seeds[@]}"; do
  train fp32 "$seed" --epochs "$epochs" --lr "$lr" || continue
  full=$workspace/$dataset-$model-fp32-seed$seed/last.pt
  for quantizer in "${quantizers[@]}"; do
    for bits in "${widths[@]}"; do
      train "$quantizer-$bits" "$seed" --epochs "$qat_epochs" --lr "$qat_lr" --lr-warmup-epochs 0 \
        --weights "$quantizer" --weight-bits "$bits" --init-from "$full" || true
    done
  done
done

if [ ${#failed[@]} -gt 0 ]; then
  echo "launch.sh: failed: ${failed[*]}" >&2
  exit 1
fi
echo "== all done; next: $python $here/evaluate.py --arch $model --dataset $dataset --workspace $workspace"
