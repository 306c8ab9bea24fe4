#!/usr/bin/env bash
# Everything that needs a GPU, in three calls of at most 8 minutes, each complete in itself, on a
# machine that may have no package registry:
#
#   benchmarks/gpu.sh build-test   build for this GPU, the whole test-suite on it, memory checkers
#   benchmarks/gpu.sh measure      build, the sweep of benchmarks/gpu.py, thresholds, plots
#   benchmarks/gpu.sh final        build, one training step and decoding of an 8B model
#
# Results go to $OUT (default: gpu_results): the tables, and everything as gpu_<call>.tar.gz. A folder named by $PEERS (default:
# .peers) that holds the competitors' unpacked wheels is put on the path. Needs torch, nvcc, ninja.
set -uo pipefail
cd "$(dirname "$0")/.."

call=${1:-}
case "$call" in
  build-test | measure | final) ;;
  *)
    echo "usage: benchmarks/gpu.sh build-test | measure | final" >&2
    exit 2
    ;;
esac
out=${OUT:-gpu_results}
peers=${PEERS:-.peers}
python=${PYTHON:-python3}
work=$(mktemp -d)
mkdir -p "$out" "$work/results"
if [ -d "$peers" ]; then
  PYTHONPATH=$(cd "$peers" && pwd)${PYTHONPATH:+:$PYTHONPATH}
  export PYTHONPATH
fi
export PATH=$PATH:/usr/local/cuda/bin
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
status=0

budget=${BUDGET:-465} # seconds of the whole call, so that packing ends within 8 minutes
left() { echo $((budget - SECONDS)); }

# step NAME SECONDS COMMAND...: run with a log and a limit, that of the call if it is nearer; note
# the exit status, go on.
step() {
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  [ "$limit" -le "$(left)" ] || limit=$(left)
  if [ "$limit" -lt 5 ]; then
    echo "== $name: not started, no time left" | tee -a "$work/results/steps.txt"
    status=1
    return 1
  fi
  timeout --kill-after=10 "$limit" "$@" >"$work/results/$name.log" 2>&1
  local code=$?
  tail -n 25 "$work/results/$name.log"
  echo "== $name: exit $code after $((SECONDS - begin)) s" | tee -a "$work/results/steps.txt"
  [ $code -eq 0 ] || status=1
  return $code
}

pack() {
  cp "$work"/results/*.csv "$work"/results/*.png "$out" 2>/dev/null
  tar -C "$work" -czf "$out/gpu_$call.tar.gz" results
  cat "$work/results/steps.txt"
  rm -rf "$work"
}
trap pack EXIT

{
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv
  nvcc --version | tail -n 2
  git rev-parse HEAD 2>/dev/null
  "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
} >"$work/results/machine.txt" 2>&1

# Only this GPU's architecture: the others are compiled, and checked statically, where no GPU is.
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
[ "$capability" = 90 ] && capability=90a
[ "$capability" = 100 ] && capability=100a
export NF4_CUDA_ARCHS=${NF4_CUDA_ARCHS:-$capability}
step build 240 "$python" -m pip install --no-build-isolation --no-deps -q -e . || exit 1

case "$call" in
  build-test)
    # The tests that touch the GPU first, then the others for as long as the call lasts.
    parallel=$("$python" -c 'import xdist; print("-n 8 --dist loadfile")' 2>/dev/null)
    # shellcheck disable=SC2086 # several words, or none
    step tests_kernels 180 "$python" -m pytest -q --maxfail=25 --durations=15 $parallel \
      --junitxml="$work/results/tests_kernels.xml" tests/test_cuda_golden.py \
      tests/test_cuda_tiles.py tests/test_cuda_library.py tests/test_*quantize*.py \
      tests/test_linear*.py
    if command -v compute-sanitizer >/dev/null; then
      for tool in memcheck racecheck; do
        # Small shapes: the checkers slow a kernel down about a hundred times.
        step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
          "$python" -m benchmarks.gpu_smoke
      done
    fi
    # shellcheck disable=SC2086
    step tests 400 "$python" -m pytest -q --maxfail=25 --durations=15 $parallel \
      --junitxml="$work/results/tests.xml"
    ;;
  measure)
    csv=$work/results/gpu_sweep.csv
    # 70 s for the case that has begun when the time is over, and for what follows.
    step sweep 460 "$python" -m benchmarks.gpu --csv "$csv" --seconds $(($(left) - 70))
    if [ -f "$csv" ]; then
      step thresholds 30 "$python" benchmarks/run.py --check "$csv"
      step table 30 "$python" benchmarks/run.py --table "$csv"
      step plot 60 "$python" benchmarks/run.py --plot "$csv"
    fi
    ;;
  final)
    step end_to_end 460 "$python" -m benchmarks.end_to_end --csv "$work/results/end_to_end.csv"
    ;;
esac
exit $status
