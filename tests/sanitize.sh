#!/bin/sh
# Runs the CPU op tests with AddressSanitizer and UndefinedBehaviorSanitizer, at every instruction
# set of this machine. Usage: tests/sanitize.sh [level ...]; builds beside the tree, in $TMPDIR.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

cd "$root"
NF4_BUILD_CUDA=0 NF4_SANITIZE=address,undefined "$python" setup.py -q build --build-base "$build/temp" \
  --build-lib "$build/lib"
# Python itself is not built with the sanitizer, so its runtime has to come first.
runtime=$(${CXX:-g++} -print-file-name=libasan.so)
cd "$build/lib"
for level in ${*:-portable avx2 avx512 avx512_bf16}; do
  echo "== $level"
  LD_PRELOAD=$runtime ASAN_OPTIONS=detect_leaks=0 NF4_CPU_ISA=$level PYTHONPATH="$build/lib" \
    "$python" -m pytest -q -p no:cacheprovider -k "cpu and not reference" \
    "$root/tests/test_quantize.py" "$root/tests/test_dequantize.py" \
    "$root/tests/test_double_quantize.py" "$root/tests/test_linear.py" \
    "$root/tests/test_linear_lora.py" "$root/tests/test_adamw_step.py"
done
