#!/usr/bin/env bash
# compute-sanitizer's memcheck, racecheck and synccheck over the tests of every kernel, on a machine with a GPU:
#
#   tests/gpu/sanitize.sh [FOLDER] [TOOL...]     FOLDER: for the reports, by default reports in the temporary folder
#
# Only the project's own kernels are looked at: the tests' references run PyTorch's too. Runs are slow, so several go side
# by side (JOBS, by default 8); TESTS names some of the tests' files and SELECT, as pytest's -k, some of the tests. Ends
# with an error where a tool found one, a test failed or a run came past LIMIT seconds (by default 500).
set -uo pipefail
cd "$(dirname "$0")/../.."
folder=$(realpath -m "${1:-${TMPDIR:-/tmp}/sanitize}"); shift || true
tools=("${@:-memcheck racecheck synccheck}")
kernels=(add_layer_norm bias_gelu embed encoder_attention latent_attention linear log_mel next_token persistent_step self_attention)
mkdir -p "$folder"
tests=${TESTS:-embedding encoder_attention gelu latent_attention layer_norm linear log_mel next_token self_attention persistent_step decoder}
# barriers of a block: the tools count the places in the code where one is made, and latent attention makes its own, one for
# each warp and stage, in one place. Past their count they break the kernel that they look at.
export BARRIERS=128
export REPEATS=3  # of what is repeated to find races that depend on time
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}  # of PyTorch on the CPU, in each of the runs
export FILTER=$(printf -- '--kernel-name kns=%s ' "${kernels[@]}") FOLDER=$folder SELECT=${SELECT:-} LIMIT=${LIMIT:-500}

one() {
  name=$(basename "$2" .py).$1
  # probing what the device can do makes calls fail, as they shall
  timeout "$LIMIT" compute-sanitizer --tool "$1" --report-api-errors no --num-cuda-barriers "$BARRIERS" --error-exitcode 9 $FILTER \
    python3 -m pytest -q --noconftest -p no:cacheprovider -W ignore -k "$SELECT" "$2" >"$FOLDER/$name.log" 2>&1
  status=$?
  echo "$name: status $status; $(grep -o '[A-Z]* SUMMARY.*' "$FOLDER/$name.log"); $(grep -E '[0-9] (passed|failed)' "$FOLDER/$name.log" | tail -1)"
  [[ $status -eq 0 || $status -eq 5 ]]  # 5: SELECT leaves none of its tests; xargs must not end at a 255
}
export -f one
for tool in ${tools[*]}; do
  for test in $tests; do
    echo "$tool tests/gpu/test_$test.py"
  done
done | xargs -P "${JOBS:-8}" -L 1 bash -c 'one "$@"' _
