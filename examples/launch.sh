#!/usr/bin/env bash
# Trains MODEL on DATASET in full precision, then fine-tunes it with low-bit weights: every quantizer, number of bits and seed.
#
#     examples/launch.sh MODEL DATASET EPOCHS BATCH LR GPUS
#     examples/launch.sh resnet20 mnist5k 10 64 0.1 0                  # GPUS 0: one process on the CPU
#     SEEDS="0 1 2 3 4" BITS="2 3 4" examples/launch.sh resnet20 cifar10 164 32 0.1 4
#     QUANTIZERS="xnor dorefa" BITS="1 2" QAT_LR=0.1 examples/launch.sh resnet20_q mnist5k 10 64 0.1 0
#
# BATCH is that of one process. What is finished is skipped, what was interrupted goes on: call it again with the same arguments. Ctrl-C (or
# SIGTERM) writes a checkpoint and stops everything; a second one kills. A training that fails (its loss is not finite, say) is named at
# the end, the others go on. From the environment:
#
#     SEEDS="0 1 2"  BITS="3 4"  QUANTIZERS="po2 po2plus"; uniform, lsq, ternary (always 2 bits), and for the binary networks, whose names
#                    end in _q, xnor (always 1) and dorefa, with inputs of as many bits as the weights
#     QAT_EPOCHS     epochs of fine-tuning; a fifth of EPOCHS if not set
#     QAT_LR         its peak learning rate; a tenth of LR if not set
#     WORKSPACE      folder of checkpoints and logs, one folder a training; runs if not set
#     TRAIN_FLAGS    more flags for every training: "--data-path DATA --weight-decay 5e-4"
#     QAT_FLAGS      for fine-tuning: "--activation-bits 4 --float-layers conv1 fc", which evaluate.py takes as well
#     PYTHON         interpreter; python if not set
set -euo pipefail

if [ $# -ne 6 ]; then
  echo "usage: launch.sh MODEL DATASET EPOCHS BATCH LR GPUS; got $# arguments" >&2
  exit 2
fi
model=$1 dataset=$2 epochs=$3 batch=$4 lr=$5 gpus=$6
here=$(cd "$(dirname "$0")" && pwd)
. "$here/trainings.sh"
whole_numbers "EPOCHS $epochs" "BATCH $batch" "GPUS $gpus"
use_gpus "$gpus"
qat_epochs=${QAT_EPOCHS:-$(((epochs + 4) / 5))}
qat_lr=${QAT_LR:-$(awk -v lr="$lr" 'BEGIN { print lr / 10 }')}
read -ra seeds <<<"${SEEDS:-0 1 2}"
read -ra widths <<<"${BITS:-3 4}"
read -ra quantizers <<<"${QUANTIZERS:-po2 po2plus}"
read -ra qat_flags <<<"${QAT_FLAGS:-}"
whole_numbers "${seeds[@]/#/SEEDS }" "${widths[@]/#/BITS }"

# bits_of QUANTIZER: those of its weights, where it has no choice not BITS.
bits_of() {
  case $1 in
    xnor) echo 1 ;;
    ternary) echo 2 ;;
    *) echo "${widths[*]}" ;;
  esac
}

# values_of FLAG WORDS...: what follows the flag, up to the next one.
values_of() {
  local flag=$1 word on=
  for word in "${@:2}"; do
    case $word in
      "$flag") on=1 ;;
      "$flag"=*) echo "${word#*=}" ;;
      --* | -[a-zA-Z]*) on= ;;
      *) if [ -n "$on" ]; then echo "$word"; fi ;;
    esac
  done
}

for quantizer in "${quantizers[@]}"; do # now, and not after the full-precision training
  case $quantizer in
    po2 | po2plus | uniform | lsq) possible='[2-8]' those='from 2 to 8' ;;
    dorefa) possible='([1-8]|16)' those='from 1 to 8 or 16' ;;
    xnor | ternary) continue ;;
    *) echo "launch.sh: QUANTIZERS must be of po2, po2plus, uniform, lsq, ternary, xnor and dorefa; got '$quantizer'" >&2 && exit 2 ;;
  esac
  for bits in "${widths[@]}"; do
    if ! [[ $bits =~ ^$possible$ ]]; then
      echo "launch.sh: BITS must be $those with $quantizer; got '$bits'" >&2
      exit 2
    fi
  done
done
for flag in --rectify --gradient-bits --sign-gradient --scale-adjusted --no-scale-adjusted; do
  for word in "${more[@]}" "${qat_flags[@]}"; do
    if [ "${word%%=*}" = "$flag" ]; then
      echo "launch.sh: $flag is for train.py, whose runs zoo.py compares: evaluate.py knows one variant of each quantizer" >&2
      exit 2
    fi
  done
done
activation_bits=$(values_of --activation-bits "${qat_flags[@]}")$(values_of --weight-activation-bits "${qat_flags[@]}")
mapfile -t float_layers < <(values_of --float-layers "${qat_flags[@]}")

for seed in "${seeds[@]}"; do
  shared=(--arch "$model" --dataset "$dataset" --batch-size "$batch" --seed "$seed")
  train "$dataset-$model-fp32-seed$seed" "${shared[@]}" --epochs "$epochs" --lr "$lr" || continue
  full=$workspace/$dataset-$model-fp32-seed$seed/last.pt
  for quantizer in "${quantizers[@]}"; do
    for bits in $(bits_of "$quantizer"); do
      config=$quantizer-$bits inputs=${activation_bits:-32} # as train.py calls it
      case $quantizer in xnor | dorefa) inputs=${activation_bits:-$bits} ;; esac
      if [ "$inputs" -ne 32 ]; then config+=-a$inputs; fi
      if [ ${#float_layers[@]} -gt 0 ]; then config+=-float$(printf '_%s' "${float_layers[@]//[^[:alnum:]_.*]/+}"); fi
      train "$dataset-$model-$config-seed$seed" "${shared[@]}" --epochs "$qat_epochs" --lr "$qat_lr" --lr-warmup-epochs 0 \
        --weights "$quantizer" --weight-bits "$bits" --init-from "$full" "${qat_flags[@]}" || true
    done
  done
done

name_failures
next=("$python" "$here/evaluate.py" --arch "$model" --dataset "$dataset" --workspace "$workspace")
next+=(--seeds "${seeds[@]}" --quantizers "${quantizers[@]}" --bits "${widths[@]}")
for flag in --width --num-classes --data-path --image-size --limit-test --activation-bits --weight-activation-bits --float-layers; do
  mapfile -t values < <(values_of "$flag" "${more[@]}" "${qat_flags[@]}")
  if [ ${#values[@]} -gt 0 ]; then next+=("$flag" "${values[@]}"); fi
done
echo "== all done; next:$(printf ' %q' "${next[@]}")"
