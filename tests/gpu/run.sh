#!/usr/bin/env bash
# What only a GPU can show, in under 8 minutes -> one Markdown table, OUT/gpu.md, for docs/clusters.md:
#   bash tests/gpu/run.sh [--small] [OUT]           # OUT: outputs/gpu; --small: on a CPU, 100 s of its time
#   bash tests/gpu/run.sh --fetch-wheels            # before, where there is a network: into wheels/, which git ignores
#
# A machine without a network needs PyTorch with CUDA, and what wheels.py says is mostly there with it; all else comes
# from wheels/, in the versions that the tests ran with. Python of another version than 3.12: PYTHON_VERSION=3.11 before
# --fetch-wheels. Nothing is installed into the machine's own environment.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}

out=$repository/outputs/gpu
small=()
while [ $# -gt 0 ]; do
  case $1 in
  --fetch-wheels) exec "$python" "$here/wheels.py" "$repository/wheels" --python "${PYTHON_VERSION:-3.12}" ;;
  --small) small=(--small) ;;
  -*)
    echo "usage: bash tests/gpu/run.sh [--small] [--fetch-wheels] [OUT]" >&2
    exit 2
    ;;
  *) out=$1 ;;
  esac
  shift
done
mkdir -p "$out"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
path=$repository/src
if compgen -G "$repository/wheels/*.whl" >/dev/null && [ ${#small[@]} = 0 ]; then
  # A folder before the machine's own packages, no environment: one that is made of an environment does not see them.
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" \
    "$repository"/wheels/*.whl
  path=$path:$work/site
fi
if [ ${#small[@]} != 0 ]; then
  export OMP_NUM_THREADS=1 # threads of tiny products wait for each other busily: many times the time on a busy machine
fi
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} PARTIALTUNE_CACHE=$work/cache HF_HUB_OFFLINE=1
"$python" "$here/table.py" --work "$work" --output "$out/gpu.md" "${small[@]}"
