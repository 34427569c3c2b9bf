#!/usr/bin/env bash
# One machine with all of its GPUs, one training process a GPU; with none, one process on the CPU:
#   bash recipes/launch/node.sh RECIPE OUTPUT_DIR [--key value ...]
# A rented cloud machine runs it from a clone of this repository: it makes an environment in build/venv unless one with
# partialtune is active. A pod runs it in the image of recipes/launch/Dockerfile: pytorchjob.yaml says how.
#
# Preemption: SIGTERM, which clouds and Kubernetes send before they take a machine away, goes to the training processes;
# they save a checkpoint, and this script ends with 143. The same command goes on from there. On a cloud machine that
# comes back by itself let it be started at each boot, with OUTPUT_DIR on a disk that stays, in `crontab -e`:
#   @reboot bash /home/me/partialtune/recipes/launch/node.sh /home/me/recipe.yaml /disk/run >>/disk/run.log 2>&1
# A finished run is told so and ends with 0, so that nothing is trained twice.
#
# With PET_MAX_RESTARTS=3 in the environment a process that is killed is started again, up to three times, and all go on
# from the newest checkpoint; on one machine alone (docs/clusters.md).
#
# Several machines: PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT, which torchrun reads from the
# environment, say so (Kubeflow sets them). Where they do not share OUTPUT_DIR, only the first one has the run's exit code;
# another one, which got no signal itself, ends with 1 then.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: bash node.sh RECIPE OUTPUT_DIR [--key value ...]" >&2
  exit 2
fi
recipe=$1
run=$2
shift 2

# As the first process of a container this script would not be ended by a signal that nothing is set up for.
signalled=false
launcher=
trap 'if "$signalled"; then :; else signalled=true; [ -z "$launcher" ] || kill -TERM "$launcher" || true; fi' TERM
trap ':' INT # the terminal sends it to the launcher too: wait for its end

install() {
  local repository venv
  repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
  venv=$repository/build/venv
  if [ ! -e "$venv/complete" ]; then # a machine may have been taken away while pip was at work
    echo "Installing partialtune into $venv"
    python3 -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet "$repository"
    touch "$venv/complete"
  fi
  PATH=$venv/bin:$PATH
}
command -v partialtune >/dev/null || install

gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true
  else
    { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true
  fi
}
processes=${PET_NPROC_PER_NODE:-auto}
case $processes in
auto | gpu)
  processes=$(gpus)
  if [ "$processes" = 0 ]; then
    echo "No GPU is visible (nvidia-smi --list-gpus, CUDA_VISIBLE_DEVICES): one process on the CPU"
    processes=1
  fi
  ;;
esac
machines=()
[ -n "${PET_NNODES:-}" ] || machines=(--standalone)

exit_code() { # of the run itself, by its own word: launchers turn every failure into 1
  sed -n 's/^ *"code": *\([0-9]*\).*/\1/p' "$run/exit.json" 2>/dev/null || true
}
if [ "$(exit_code)" = 143 ]; then
  rm -f "$run/exit.json" # of an earlier start; what this one says counts
fi
if "$signalled"; then
  exit 143
fi

# By itself torchrun kills after 30 s what it has passed SIGTERM on to: a save may take longer.
torchrun "${machines[@]}" --nproc-per-node "$processes" --shutdown-timeout 3600 \
  -m partialtune train "$recipe" --output_dir "$run" --resume_from_checkpoint auto "$@" &
launcher=$!

while kill -0 "$launcher" 2>/dev/null; do # a signal ends `wait` before the launcher ends
  wait "$launcher" || true
done
code=0
wait "$launcher" || code=$?

if [ "$code" != 0 ]; then
  if [ "${PET_NODE_RANK:-0}" != 0 ]; then
    for _ in {1..20}; do # the first machine writes it, and this one may be the faster one to end
      [ -z "$(exit_code)" ] || break
      sleep 0.5
    done
  fi
  said=$(exit_code)
  if [ "${said:-0}" != 0 ]; then
    code=$said
  elif "$signalled"; then
    code=143 # before the first step there is nothing to save
  fi
fi
exit "$code"
