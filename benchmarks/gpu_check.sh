#!/usr/bin/env bash
# What only a GPU can prove, each mode in under nine minutes (docs/benchmarks/running.md has what each part takes):
#   benchmarks/gpu_check.sh check OUTDIR   what reading left in doubt about this torch and triton, gpu-marked tests, then
#                                          compute-sanitizer on the `sanitize` ones
#   benchmarks/gpu_check.sh bench OUTDIR   the real shapes: the bars first, then every peer that is installed
#   benchmarks/gpu_check.sh tune  OUTDIR   times one loop or two, stages, raster and the length of a split in the matrix
#                                          kernels, the bounded backward's tile width and the single pass's chunk
# In this order: check first, which says what the others may be trusted for.
# Writes JSON and logs under OUTDIR. Exit 2: there is no GPU, and it says what was not proved.
# PYTHON= chooses the interpreter (python3), LIMIT= the seconds, COMMIT= what to call a copy without git. Nothing is
# installed, no setting of the card touched; where nvcc is there, the CUDA library is built in place.
set -uo pipefail
mode=${1:-} out=${2:-}
if [[ ! $mode =~ ^(check|tune|bench)$ || -z $out ]]; then
  echo "usage: benchmarks/gpu_check.sh check|tune|bench OUTDIR" >&2
  exit 64
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 73
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3} limit=${LIMIT:-525}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
begin=$SECONDS
left() { echo $((limit - (SECONDS - begin))); }
# within SECONDS COMMAND...: at most that long and at most what is left of the limit, then killed
within() {
  local most=$1 rest
  shift
  rest=$(left)
  ((rest < most)) && most=$rest
  ((most > 0)) || return 124
  timeout -k 5 "$most" "$@"
}

# a cold disk takes its time over the first import of torch
within 180 "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>"$out/probe.log"
probe=$?
if ((probe != 0 && probe != 124)); then
  case $mode in
    check) what="the kernels on a GPU: gpu-marked tests, memcheck, racecheck" ;;
    tune) what="the tile table, the bounded backward's tiles, the single pass's chunk: no candidate was timed" ;;
    bench) what="every hardware figure: time, memory and error on the real shapes" ;;
  esac
  echo "no GPU here (torch sees none; $out/probe.log has what it said). NOT PROVED: $what."
  printf '{"kind": "%s", "gpu": false, "not_proved": "%s"}\n' "$mode" "$what" >"$out/$mode.json"
  exit 2
fi

within 60 "$python" - "$out/versions.json" <<'PY'
import json, sys
from benchmarks import machine
made = {"machine": machine.describe("cuda"), "versions": machine.versions(), **machine.commit()}
json.dump(made, open(sys.argv[1], "w"), indent=1)
print(made["machine"]["gpu"], made["versions"])
PY

if [[ $mode == tune ]]; then
  within 600 "$python" -m benchmarks.tune --out "$out/tune.json" --minutes 5 --step-minutes 2 2>&1 | tee "$out/tune.log"
  status=${PIPESTATUS[0]}
  [[ -s $out/tune.json ]] || printf '{"kind": "tune", "gpu": true, "exit": %s}\n' "$status" >"$out/tune.json"
  exit "$status"
fi

# the bounded backward's lists by the compiled library; without it they come from torch
build_csrc() {
  if command -v nvcc >/dev/null; then
    within 120 "$python" csrc/build.py >"$out/csrc.log" 2>&1 && return
    tail -3 "$out/csrc.log"
  fi
  echo "the CUDA library is not built: NOT PROVED: its kernels, and the bounded backward with its lists"
}

if [[ $mode == bench ]]; then
  status=0 tags=""
  # each call writes its JSON after every case, so a cut-off loses one case; an implementation that breaks the GPU's
  # context (exit 3) is left out of a second try
  run() {
    local tag=$1 code broken=()
    shift
    while :; do
      (($(left) > 30)) || { echo "$tag: NOT RUN, out of time"; tags+="\"$tag\": \"not run\", "; status=1; return; }
      within 600 "$python" -m benchmarks --device cuda --out "$out" --tag "$tag" "$@" "${broken[@]}" 2>&1 |
        tee "$out/$tag.log"
      code=${PIPESTATUS[0]}
      [[ $code == 3 ]] || break
      broken+=(--broken "$(tail -n 1 "$out/$tag.log" | awk '{print $NF}')")
    done
    tags+="\"$tag\": \"exit $code\", "
    [[ $code == 0 && ${#broken[@]} == 0 ]] || status=1
  }
  ours=(--impl eager --impl ours-triton)
  # the bars: exact forward and backward, single pass, bandwidth; bounded; precision
  run exact --case qwen2.5-7b-8k --case llama-3.1-8b-8k --case llama-3.1-8b-8k-loss --case logprob-8k \
    --case residual-256x8192 --repeats 15 --seconds 10 "${ours[@]}" --impl eager-loss --impl ours-triton-loss \
    --impl ours-triton-loss-single-pass --impl eager-residual --impl ours-triton-residual
  run bounded --case 'qwen2.5-7b-32k-bounded-0.01' --case 'qwen2.5-7b-32k-bounded-zipf1.2' --repeats 7 --seconds 10 \
    "${ours[@]}" --impl ours-triton-bounded
  run precision --case 'precision-*' --repeats 3 --seconds 3 --no-memory "${ours[@]}" --impl eager-fp32-head
  if [[ ! -e flowrl_kernels/cuda/libflowrl_cuda.so ]]; then  # else `bounded` had its lists already
    build_csrc
    run bounded-csrc --case 'qwen2.5-7b-32k-bounded-0.01' --case 'qwen2.5-7b-32k-bounded-zipf1.2' --repeats 7 \
      --seconds 10 --no-memory --impl ours-triton-bounded
  fi
  (($(left) > 60)) && within 60 "$python" csrc/measure.py --out "$out/csrc.json"
  # beside every peer; our torch path is none, and so slow here that it would leave the others three repeats
  run peers --case qwen2.5-7b-8k --case llama-3.1-8b-8k --repeats 7 --seconds 20 "${ours[@]}" \
    --impl eager-fp32-head --impl torch.compile --impl F.linear_cross_entropy --impl F.linear_cross_entropy-chunked \
    --impl F.linear_cross_entropy-mean --impl liger-flce --impl liger-scaled-ce --impl liger-chunked-grpo --impl cce \
    --impl cce-exact --impl trl-chunked --impl verl-triton --impl verl-torch --impl quack --impl quack-scaled-exp \
    --impl rl-kernel-triton --impl rl-kernel-cuda
  run peers-logits --case logprob-8k --repeats 7 --seconds 5 --impl ours-triton --impl torch.compile \
    --impl rl-kernel-logp-triton --impl rl-kernel-logp-cuda
  run options --case qwen2.5-7b-8k-entropy --case qwen2.5-7b-8k-frozen --case qwen2.5-1.5b-8k --case qwen2.5-32b-8k \
    --repeats 5 --seconds 5 "${ours[@]}"
  run scaling --case 'qwen2.5-7b-*-scaling' --repeats 5 --seconds 8 "${ours[@]}" \
    --impl liger-flce --impl cce --impl trl-chunked --impl verl-triton
  (($(left) > 30)) && within 60 "$python" -m benchmarks.several --device cuda --out "$out/several.json"
  (($(left) > 30)) && within 60 "$python" -m benchmarks.sampled_time --device cuda --order --out "$out/sampled.json"
  (($(left) > 60)) && within 150 "$python" -m benchmarks end-to-end --device cuda --out "$out" --tag end-to-end
  (($(left) > 60)) && within 60 "$python" -m benchmarks.kept --device cuda --out "$out/kept.json"
  run levels --case 'qwen2.5-7b-8k-*' --repeats 5 --seconds 5 "${ours[@]}"
  printf '{"kind": "bench", "gpu": true, %s"seconds": %s}\n' "$tags" "$((SECONDS - begin))" | tee "$out/bench.json"
  exit $status
fi

# check: only the files that hold such tests, so that one that lacks a package elsewhere stops nothing; several workers
# compile at once, and a kernel that breaks its process's context takes only that worker's tests with it
within 90 "$python" -m benchmarks.doubts --out "$out/doubts.json" 2>&1 | tee "$out/doubts.log"
doubts=${PIPESTATUS[0]}
build_csrc
mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.(gpu|sanitize)' tests)
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 6 --dist worksteal)
within 330 "$python" -m pytest "${files[@]}" -m gpu -o addopts= -q -rs -p no:cacheprovider --timeout 240 \
  --continue-on-collection-errors "${workers[@]}" --junitxml "$out/gpu-tests.xml" 2>&1 | tee "$out/gpu-tests.log"
tests=${PIPESTATUS[0]}
[[ $tests == 5 ]] && echo "no test is marked gpu: NOT PROVED: anything about kernels on this GPU"
memcheck=skipped racecheck=skipped
mapfile -t files < <(grep -l 'mark\.sanitize' "${files[@]}")
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    if (($(left) < 60)); then
      echo "$tool: NOT RUN, out of time"
      printf -v "$tool" '%s' "out of time"
      continue
    fi
    # a tensor an allocation: inside the caching allocator's blocks no access is out of bounds
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 within 600 compute-sanitizer --tool "$tool" --error-exitcode 77 \
      --target-processes all "$python" -m pytest "${files[@]}" -m sanitize -o addopts= -q -x -p no:cacheprovider \
      --timeout 0 >"$out/$tool.log" 2>&1
    printf -v "$tool" '%s' "exit $?"
    tail -4 "$out/$tool.log"
  done
else
  echo "compute-sanitizer is not on the path: NOT PROVED: memcheck, racecheck"
fi
printf '{"kind": "check", "gpu": true, "doubts_exit": %s, "gpu_tests_exit": %s, "memcheck": "%s", "racecheck": "%s", "seconds": %s}\n' \
  "$doubts" "$tests" "$memcheck" "$racecheck" "$((SECONDS - begin))" | tee "$out/check.json"
[[ $doubts == 0 && $tests == 0 && $memcheck == "exit 0" && $racecheck == "exit 0" ]]
