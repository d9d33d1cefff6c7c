# Sourced by launch.sh and zoo.sh: runs trainings one after the other, each in a folder of its own under $workspace. Expects $here, this
# folder. Sets, from the environment, $python, $workspace, $more and $failed, the names of trainings that ended with an error.
own=$(basename "$0")
python=${PYTHON:-python}
workspace=${WORKSPACE:-runs}
read -ra more <<<"${TRAIN_FLAGS:-}"
failed=()

# whole_numbers "NAME VALUE"...: ends the script, naming the first that is none.
whole_numbers() {
  local number
  for number in "$@"; do
    if ! [[ ${number#* } =~ ^[0-9]+$ ]]; then
      echo "$own: ${number%% *} must be a whole number; got '${number#* }'" >&2
      exit 2
    fi
  done
}

# use_gpus N: 0: one process on the CPU; else one on each of N GPUs.
use_gpus() {
  processes=$(($1 > 1 ? $1 : 1))
  if [ "$1" -eq 0 ]; then
    launcher=("$python") device=cpu
  else
    launcher=("$python" -m torch.distributed.run --standalone "--nproc-per-node=$1") device=auto
  fi
}

# In the background, so that a signal reaches this script at once and not when the training has ended: the trap passes it on and waits.
child=
stop() {
  trap - INT TERM
  if [ -n "$child" ]; then
    kill -TERM "$child" 2>/dev/null || true
    wait "$child" || true
  fi
  echo "$own: stopped; the same command goes on" >&2
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM

# begins_from FLAGS...: a sum of the file that --init-from names, if it does.
begins_from() {
  while [ $# -gt 0 ] && [ "$1" != --init-from ]; do shift; done
  if [ $# -gt 1 ] && [ -e "$2" ]; then cksum <"$2"; fi
}

# train NAME FLAGS...: 0 if the training has come to its end, now or before; 1 if it failed. Anything else ends the script.
train() {
  local name=$1 folder=$workspace/$1 flags=("${@:2}" "${more[@]}") resume=() status=0 asked begun begins
  asked=$(printf ' %q' "${flags[@]}") # words that zoo.py can take apart, whatever is in them
  asked=${asked# }
  if [ "$processes" -gt 1 ]; then asked+=" # $processes processes"; fi # whose batches add up
  mkdir -p "$folder" || exit 1 # said here: set -e does not hold in functions that are asked for their status
  if [ -e "$folder/last.pt" ] && [ ! -e "$folder/flags" ]; then
    echo "$own: $folder holds a training that was not begun by this script; move it or choose another WORKSPACE" >&2
    exit 2
  fi
  begun=$(cat "$folder/flags" 2>/dev/null || true)
  if [ -e "$folder/last.pt" ] && [ "$begun" != "$asked" ]; then
    printf '%s: %s was begun with other settings; delete it or choose another WORKSPACE\n  there: %s\n  asked: %s\n' \
      "$own" "$folder" "$begun" "$asked" >&2
    exit 2
  fi
  begins=$(begins_from "${flags[@]}")
  if [ -e "$folder/last.pt" ] && [ -e "$folder/begins" ] && [ "$(cat "$folder/begins")" != "$begins" ]; then
    echo "$own: $folder began with other weights than --init-from now holds; delete it or choose another WORKSPACE" >&2
    exit 2
  fi
  if [ -e "$folder/done" ] && [ -e "$folder/last.pt" ]; then
    echo "== $name: done"
    return 0
  fi
  echo "$asked" >"$folder/flags"
  if [ ! -e "$folder/last.pt" ]; then echo "$begins" >"$folder/begins"; fi
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

# name_failures: ends the script with 1 if there were any.
name_failures() {
  if [ ${#failed[@]} -gt 0 ]; then
    echo "$own: failed: ${failed[*]}" >&2
    exit 1
  fi
}
