#!/usr/bin/env bash
# Everything that needs a GPU, in three calls of a few minutes, each complete in itself, on a
# machine that may have no package registry:
#
#   benchmarks/gpu.sh build-test   the test-suite on this GPU, and the memory checkers (4 minutes)
#   benchmarks/gpu.sh measure      the sweep of benchmarks/gpu.py, thresholds, plots (4 minutes)
#   benchmarks/gpu.sh final        one training step and decoding of an 8B model (3 minutes)
#
# Each builds the libraries first where they are missing or not for this GPU. BUDGET is the seconds
# that a call may take. Results go to $OUT (default: gpu_results): the tables, and everything as
# gpu_<call>.tar.gz. A folder named by $PEERS (default: .peers) that holds the competitors' unpacked
# wheels is put on the path. Needs torch; to build, nvcc and ninja.
set -uo pipefail
cd "$(dirname "$0")/.."

call=${1:-}
case "$call" in
  build-test) default=240 ;;
  measure) default=240 ;;
  final) default=180 ;;
  *)
    echo "usage: benchmarks/gpu.sh build-test | measure | final" >&2
    exit 2
    ;;
esac
budget=$((${BUDGET:-$default} - 10)) # the rest is for packing
out=${OUT:-gpu_results}
peers=${PEERS:-.peers}
python=${PYTHON:-python3}
work=$(mktemp -d)
results=$work/results
mkdir -p "$out" "$results"
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
[ -d "$peers" ] && PYTHONPATH=$PYTHONPATH:$(cd "$peers" && pwd)
export PYTHONPATH PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export PATH=$PATH:/usr/local/cuda/bin

left() { echo $((budget - SECONDS)); }

# step NAME SECONDS COMMAND...: run with a log and a limit, that of the call if it is nearer; note
# the exit status, go on.
step() {
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  [ "$limit" -le "$(left)" ] || limit=$(left)
  if [ "$limit" -lt 5 ]; then
    echo "== $name: not started, no time left" | tee -a "$results/steps.txt"
    return 1
  fi
  timeout --kill-after=5 "$limit" "$@" >"$results/$name.log" 2>&1
  local code=$?
  tail -n 25 "$results/$name.log"
  echo "== $name: exit $code after $((SECONDS - begin)) s" | tee -a "$results/steps.txt"
  return $code
}

pack() {
  cp "$results"/*.csv "$results"/*.png "$results"/failures.txt "$out" 2>/dev/null
  tar -C "$work" -czf "$out/gpu_$call.tar.gz" results
  cat "$results/steps.txt"
  rm -rf "$work"
}
trap pack EXIT

{
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv
  nvcc --version | tail -n 2
  git rev-parse HEAD 2>/dev/null
  "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
} >"$results/machine.txt" 2>&1

usable='import nf4; s = nf4.available_backends(); print(s); assert s["cuda"] and s["cpu"]'
if ! step usable 40 "$python" -c "$usable"; then
  # Only this GPU's architecture: the others are compiled, and checked statically, where no GPU is.
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
  [ "$capability" = 90 ] && capability=90a
  export NF4_CUDA_ARCHS=${NF4_CUDA_ARCHS:-$capability}
  step build 150 "$python" setup.py build_ext --inplace || exit 1
fi

# tests NAME SECONDS ARGUMENTS...: what of the test-suite is about this machine.
tests() {
  local name=$1 limit=$2 parallel=()
  shift 2
  if "$python" -c 'import xdist, pytest_timeout' 2>/dev/null; then
    parallel=(-n 14 --dist load --max-worker-restart 60 --timeout 60 --timeout-method thread)
  fi
  NF4_FAILURES=$results/failures.txt OMP_NUM_THREADS=1 step "$name" "$limit" \
    "$python" -m pytest -p benchmarks.pytest_gpu -q --durations=15 "${parallel[@]}" tests \
    --ignore-glob='tests/test_cuda_emulated*' --ignore-glob='tests/test_*_static.py' "$@"
}

# Small shapes: the checkers slow a kernel down about a hundred times. Tensors are cudaMalloc's own
# blocks, or memcheck would see one block of the caching allocator.
checkers() {
  for backend in cuda triton; do
    for tool in memcheck racecheck; do
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "${tool}_$backend" 40 compute-sanitizer \
        --tool "$tool" --error-exitcode 9 "$python" -m benchmarks.gpu_smoke "$backend"
    done
  done
}

case "$call" in
  build-test)
    # Beside the tests: neither is timed. The tests of the GPU backends first, then the others for
    # as long as the call lasts.
    command -v compute-sanitizer >/dev/null && checkers &
    tests tests_gpu 120 -k 'cuda or triton or device'
    tests tests_rest 200 -k 'not (cuda or triton or device)'
    wait
    ;;
  measure)
    csv=$results/gpu_sweep.csv
    # 30 s for what follows, and the case that has begun when the time is over.
    step sweep 230 "$python" -m benchmarks.gpu --csv "$csv" --seconds $(($(left) - 30))
    if [ -f "$csv" ]; then
      step thresholds 30 "$python" benchmarks/run.py --check "$csv"
      step table 30 "$python" benchmarks/run.py --table "$csv"
      step plot 60 "$python" benchmarks/run.py --plot "$csv"
    fi
    ;;
  final)
    step end_to_end 170 "$python" -m benchmarks.end_to_end --csv "$results/end_to_end.csv"
    ;;
esac
! grep -qE 'exit [1-9]|not started' "$results/steps.txt"
