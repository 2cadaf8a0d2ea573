#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build for it, the `cuda` tests, compute-sanitizer, the benchmark.
# Usage: benchmarks/gpu.sh FOLDER     (JSON and logs go there; PYTHON names the interpreter that has torch;
# FASTLANE_CUTLASS the folder of CUTLASS's headers, unless the wheel is installed)
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh FOLDER}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."
mkdir -p "$out" && out=$(cd "$out" && pwd)
failed=0
step() {  # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  timeout "$seconds" "$@" > "$out/$name.log" 2>&1
  local status=$?
  echo "$name: exit status $status, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
  [ $status -eq 0 ] || { failed=1; tail -n 15 "$out/$name.log"; }
  return $status
}

: > "$out/summary.txt"
capability=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || exit 1
[ "$capability" = 9.0 ] && capability=9.0a
export TORCH_CUDA_ARCH_LIST=$capability FASTLANE_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
export PYTHONPATH=$PWD
step build 150 "$python" setup.py build_ext --inplace || exit 1
"$python" -m fastlane_ext info --json > "$out/info.json" || failed=1
if [ "$capability" = 9.0a ] && ! grep -q '"hopper": true' "$out/info.json"; then
  echo "no Hopper kernels in this build: set FASTLANE_CUTLASS" | tee -a "$out/summary.txt"
  failed=1
fi
test=("$python" -m pytest -q -p no:cacheprovider)
FASTLANE_PATH=library step library-tests 50 "${test[@]}" -m cuda tests/test_cuda.py tests/test_cuda_mlp.py
FASTLANE_PATH= step tests 60 "${test[@]}" -m cuda tests/test_cuda.py tests/test_cuda_mlp.py
FASTLANE_PATH=fused step hopper-tests 50 "${test[@]}" -m hopper tests/test_cuda_hopper.py
small='test_options or (test_stack and tiny) or (test_layouts and misaligned) or (test_a_narrow_stack and tiny)'
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
# Without torch's cache every tensor has an allocation of its own, whose ends the tools see.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck initcheck; do
  # initcheck must see every kernel: what the library wrote is not uninitialised.
  only=(--kernel-name kernel_substring=fastlane)
  [ "$tool" = initcheck ] && only=()
  FASTLANE_PATH= step "$tool" 30 "$sanitizer" --tool "$tool" --error-exitcode 9 "${only[@]}" \
    "${test[@]}" -m cuda tests/test_cuda.py -k "$small" -x
  FASTLANE_PATH=fused step "$tool-hopper" 20 "$sanitizer" --tool "$tool" --error-exitcode 9 \
    "${test[@]}" -m hopper tests/test_cuda_hopper.py -k test_hopper_small -x
done
unset PYTORCH_NO_CUDA_MEMORY_CACHING
# torch.compile searches for minutes, so it gets what time is left.
step benchmark 40 "$python" benchmarks/gpu_bench.py --no-compile --json "$out/gpu.json"
step benchmark-compile 90 "$python" benchmarks/gpu_bench.py --json "$out/gpu-compile.json"
cat "$out/summary.txt"
exit $failed
