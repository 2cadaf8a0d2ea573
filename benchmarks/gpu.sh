#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build for it, the `cuda` tests, the benchmark, compute-sanitizer.
# Usage: benchmarks/gpu.sh FOLDER [STEP...]    with STEPs, only these follow the build
# FOLDER gets summary.txt, gpu.log and JSON. From the environment: PYTHON, the interpreter that has torch;
# FASTLANE_CUTLASS, the folder of CUTLASS's headers, unless the wheel is installed; GPU_SECONDS, when all must be over.
set -uo pipefail
usage='usage: benchmarks/gpu.sh FOLDER [STEP...]'
out=${1:?$usage}
shift
steps=(tests hopper-tests benchmark library-tests {memcheck,racecheck,initcheck}{,-hopper} benchmark-compile)
for name in "$@"; do
  [[ " ${steps[*]} " == *" $name "* ]] || { echo "STEP: got '$name', expected one of: ${steps[*]}"; exit 2; }
done
chosen=" ${*:-${steps[*]}} "
python=${PYTHON:-python3}
deadline=${GPU_SECONDS:-480}
[[ $deadline =~ ^[0-9]+$ ]] || { echo "GPU_SECONDS: got '$deadline', expected whole seconds"; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit
cd "$(dirname "$0")/.." || exit
logs=$(mktemp -d) || exit
trap 'rm -rf "$logs"' EXIT
rm -f "$out"/{summary.txt,gpu.log,info.json,gpu.json,gpu-compile.json}
: > "$out/summary.txt" || exit

note() { echo "$1" | tee -a "$out/summary.txt"; }

step() {  # NAME SECONDS COMMAND...; may run in the background
  local name=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS)) status
  shift 2
  [[ $name == build || $chosen == *" $name "* ]] || return 0
  ((limit < left)) || limit=$left
  ((limit > 0)) || { note "$name: no time left"; return 1; }
  # An interrupted pytest still says what failed.
  timeout --signal=INT --kill-after=5 "$limit" "$@" > "$logs/$name" 2>&1
  status=$?
  # pytest is content if it skipped every test.
  if [[ $status == 0 && " $* " == *" pytest "* ]] && ! grep -q ' passed' "$logs/$name"; then
    status=5
  fi
  {
    flock 9
    printf '\n== %s\n' "$name" >&9
    cat "$logs/$name" >&9
    local took=$((SECONDS - start)) verdict="failed with status $status"
    [[ $status == 0 ]] && verdict=passed
    [[ $status =~ ^(124|137)$ ]] && ((took >= limit)) && verdict=stopped
    note "$name: $verdict, $took s"
    [[ $verdict == passed ]] || tail -n 15 "$logs/$name"
  } 9>> "$out/gpu.log"
  return $status
}

capability=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || exit 1
[ "$capability" = 9.0 ] && capability=9.0a
export TORCH_CUDA_ARCH_LIST=$capability FASTLANE_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
step build 240 "$python" setup.py build_ext --inplace || exit 1
if ! "$python" -m fastlane_ext info --json > "$out/info.json"; then
  note "info: failed"
elif [ "$capability" = 9.0a ] && ! grep -q '"hopper": true' "$out/info.json"; then
  note "info: no Hopper kernels in this build; set FASTLANE_CUTLASS"
fi

# A test that hangs names itself in time.
pytest=("$python" -m pytest -p no:cacheprovider -rs -o faulthandler_timeout=60)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
FASTLANE_PATH= step tests 120 "${pytest[@]}" -m cuda tests/test_cuda.py tests/test_cuda_mlp.py &
FASTLANE_PATH=fused step hopper-tests 120 "${pytest[@]}" -m hopper tests/test_cuda_hopper.py &
wait
# torch.compile searches for minutes, so it comes last and gets what time is left.
step benchmark 60 "$python" benchmarks/gpu_bench.py --no-compile --json "$out/gpu.json"

# Not beside `tests`: one test of either takes 20 GiB of the GPU's memory.
FASTLANE_PATH=library step library-tests 120 "${pytest[@]}" -m cuda tests/test_cuda.py tests/test_cuda_mlp.py &
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
small='test_options or (test_stack and tiny) or (test_layouts and misaligned) or (test_a_narrow_stack and tiny)'
port=49152
check() {  # TOOL NAME OPTIONS-AND-COMMAND...
  local tool=$1 name=$2
  shift 2
  # Without torch's cache every tensor has an allocation of its own, whose ends the tools see.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$name" 120 "$sanitizer" --tool "$tool" --port "$port" --error-exitcode 9 "$@" &
  ((port += 100))
}
for tool in memcheck racecheck initcheck; do
  options=()
  # torch asks the driver for what need not exist; our own calls' errors raise.
  [ $tool = memcheck ] && options=(--report-api-errors no)
  # initcheck must see every kernel: what the library wrote is not uninitialised.
  [ $tool = initcheck ] || options+=(--kernel-name kernel_substring=fastlane)
  FASTLANE_PATH= check $tool $tool "${options[@]}" "${pytest[@]}" -m cuda tests/test_cuda.py -k "$small" -x
  FASTLANE_PATH=fused check $tool $tool-hopper "${options[@]}" \
    "${pytest[@]}" -m hopper tests/test_cuda_hopper.py -k test_hopper_small -x
done
wait

step benchmark-compile 480 "$python" benchmarks/gpu_bench.py --json "$out/gpu-compile.json"
echo && cat "$out/summary.txt"
[ -s "$out/summary.txt" ] && ! grep -qv ': passed' "$out/summary.txt"
