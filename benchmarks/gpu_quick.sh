#!/usr/bin/env bash
# The decisive figures of an NVIDIA GPU within ten minutes: docs/gpu.md, `make gpu-quick OUT=DIR`.
#
#   benchmarks/gpu_quick.sh OUT [PART ...]      PARTs in order; without any: all of them
#
# PYTHON is the interpreter. Each part has a time of its own, and one that fails stops no other.
# Every result and log is in OUT the moment it exists; a second call goes on from there. QUICK=1
# tries the same commands at small sizes on any device.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 1 ] || { echo "usage: benchmarks/gpu_quick.sh OUT [PART ...]" >&2; exit 2; }
mkdir -p "$1" && OUT=$(cd "$1" && pwd) || exit 2
shift
PARTS=${*:-environment tests compile end_to_end kernels cache_update prefill training more_end_to_end tune}
PYTHON=${PYTHON:-python3}
SIZE=${QUICK:+--quick}

source benchmarks/gpu_parts.sh gpu_quick

end_to_end() {
  $PYTHON -m benchmarks.end_to_end $SIZE ${SIZE:+--model=tiny} --output="$OUT/end_to_end.json" "$@"
}
export -f end_to_end
export PYTHON SIZE OUT

# Most of a measurement is compilation. Beside it nothing is timed, and nothing else runs: XLA
# chooses products of matrices by timing them, and chooses worse ones where others are at work.
compile() {
  local processes=${PROCESSES:-9}
  for ((i = 0; i < processes; i++)); do
    XLA_PYTHON_CLIENT_PREALLOCATE=false limited 100 "compile_$i" \
      bash -c "end_to_end --compile=$i/$processes --seconds=${COMPILE_SECONDS:-30}" &
  done
  wait
}

for part in $PARTS; do
  case $part in
    environment) environment ;;
    tests)
      XLA_PYTHON_CLIENT_PREALLOCATE=false limited 120 tests \
        $PYTHON -m pytest -o minversion=8 -W default -q -n ${WORKERS:-12} --maxfail=9 -m "not slow" \
        -k "triton or causal_attention or prefill_attention" \
        tests/pallas_kernels/{decode,causal,prefill}_attention/api_test.py tests/pallas_kernels/cache_update/api_test.py ;;
    compile) LINES_SHOWN=4 compile ;;
    end_to_end) limited 170 end_to_end bash -c "end_to_end --resume --seconds=${END_TO_END_SECONDS:-145}" ;;
    more_end_to_end) limited 130 more_end_to_end bash -c "end_to_end --resume --seconds=110" ;;
    kernels)
      limited 70 kernels $PYTHON -m pallas_kernels.bench $SIZE $([ -n "$SIZE" ] || echo --implementations=triton) \
        $([ -n "$SIZE" ] || echo --pages=16) --seconds=50 --output="$OUT/kernels.json" ;;
    cache_update)
      limited 60 cache_update $PYTHON -m benchmarks.cache_update $SIZE --output="$OUT/cache_update.json" ;;
    prefill)
      limited 70 prefill $PYTHON -m benchmarks.prefill_attention $SIZE ${SIZE:+--model=tiny} \
        --output="$OUT/prefill_attention.json" ;;
    training_tune)
      [ -n "$SIZE" ] || limited 75 training_tune $PYTHON -m benchmarks.training_attention --tune --seconds=60 ;;
    training)
      limited 80 training $PYTHON -m benchmarks.training_attention $SIZE --seconds=60 \
        --output="$OUT/training_attention.json" ;;
    tune)
      [ -n "$SIZE" ] || limited 80 tune $PYTHON -m pallas_kernels.bench --tune --seconds=65 \
        --output="$OUT/tuning.json" ;;
    *) echo "no part '$part'" >&2; exit 2 ;;
  esac
  cp pallas_kernels/tuned/nvidia_*.json "$OUT/" 2>/dev/null
done
