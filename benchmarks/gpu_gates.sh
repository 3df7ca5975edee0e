#!/usr/bin/env bash
# Gates of both methods for SmolLM2, made and measured on an NVIDIA GPU within ten minutes or so.
#
#   benchmarks/gpu_gates.sh OUT MODEL [PART ...]      PARTs in order; without any: all of them
#
# MODEL is a GGUF file, a checkpoint's folder, or the two of a GGUF file that was cut for a transfer:
# MODEL.part0 and MODEL.part1 (`split -n 2 -d -a 1 FILE MODEL.part`) are joined. PYTHON is the
# interpreter, PYTHONPATH may name a folder of what it lacks (docs/gpu.md; for a GGUF file also gguf,
# tokenizers and jinja2). Nothing is downloaded: the text is Python's own library, and if TEXT names
# a folder of prose, half of it.
#
# For `dms` and then `dmc`, four minutes each: closed form on 200 windows of 1,024 tokens, then as
# many steps of 8 such windows as DISTILL_SECONDS (150) hold at the speed that twelve steps had
# just before, on a cosine. Each part has a time of its own, one that fails stops no other that can
# do without it, and a second call goes on. In OUT: gates of each method, arena/, logs, runs.
# QUICK=1 tries the same commands at small sizes on any device.
#
# Measured, on windows of test files of the same text (python -m dmc_jax.arena): perplexity and divergence
# against the dense model, beside TOVA, H2O and StreamingLLM at equal slots; tokens a second of
# distillation. Not measured: seeds (one), other text than was trained on, tasks, decoding speed.
# An H200 ran these commands, but not this script: 156,000 tokens a second for dms and 124,000 for dmc
# (nvidia_h200/gates_training.json), 20 GiB a run. The times below are estimates.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 2 ] || { echo "usage: benchmarks/gpu_gates.sh OUT MODEL [PART ...]" >&2; exit 2; }
GIVEN=$(realpath -m "$2")
[ -e "$GIVEN" ] || [ -e "$GIVEN.part0" ] || { echo "gpu_gates.sh: neither $2 nor $2.part0 is there" >&2; exit 2; }
mkdir -p "$1" && OUT=$(cd "$1" && pwd) || exit 2
shift 2
PARTS=${*:-environment model data speed_dms dms speed_dmc dmc measure}
PYTHON=${PYTHON:-python3}
# Large things: not in OUT, which may have to travel.
WORK=${WORK:-${TMPDIR:-/tmp}/dmc_jax_gpu_gates}
mkdir -p "$WORK"
source benchmarks/gpu_parts.sh gpu_gates

SIZES=(1024 8 200 16 12) # tokens a window, windows a step, in closed form, of validation; steps timed
MEASURED=(--config.text.batch=8 --config.budgets=grows,end,mean)
DISTILL_SECONDS=${DISTILL_SECONDS:-150} SLOW=1
if [ -n "${QUICK:-}" ]; then
  SIZES=(128 2 2 2 2)
  MEASURED=(--config.text.lengths=64 --config.ratios=2 --config.text.windows=2 --config.others=TOVA)
  DISTILL_SECONDS=10 SLOW=6
fi
read -r LENGTH BATCH WINDOWS VALIDATION TIMED <<<"${SIZES[*]}"

MODEL=$GIVEN
[ -e "$MODEL" ] || MODEL=$WORK/model.gguf
DATA=$WORK/code${TEXT:+,$WORK/prose}

join() {
  [ "$MODEL" = "$GIVEN" ] || [ "$MODEL" -nt "$GIVEN.part1" ] && return
  cat "$GIVEN.part0" "$GIVEN.part1" >"$MODEL.partial" && mv "$MODEL.partial" "$MODEL"
}

prepare_all() {
  local tokenizer
  tokenizer=$($PYTHON -c 'import sys; from dmc_jax.checkpoints.models import find_model
print(find_model(sys.argv[1]).tokenizer)' "$MODEL") || return
  set -- --tokenizer="$tokenizer" --workers="$(nproc)" ${QUICK:+--limit_mb=2}
  $PYTHON -m dmc_jax.prepare_data "$@" --output="$WORK/code" || return
  [ -z "${TEXT:-}" ] || $PYTHON -m dmc_jax.prepare_data "$@" --input="$TEXT" --output="$WORK/prose"
}

# train NAME METHOD WINDOWS STEPS FLAG...
train() {
  local name=$1 method=$2 windows=$3 steps=$4
  shift 4
  $PYTHON -m dmc_jax.train --config="configs/gates.py:$MODEL" --config.name="$name" \
    --config.output="$OUT/runs" --config.data.path="$DATA" ${TEXT:+--config.data.weights=1,1} \
    --config.data.length="$LENGTH" --config.data.batch="$BATCH" --config.gates.method="$method" \
    --config.gates.windows="$windows" --config.eval_windows="$VALIDATION" \
    --config.distill.steps="$steps" "$@"
}

# As many steps as fit, at the speed of the last that were timed; asked once: a run keeps its number.
steps_of() {
  local file=$OUT/steps_$1
  [ -s "$file" ] || $PYTHON - "$OUT/runs/speed_$1/metrics.jsonl" "$DISTILL_SECONDS" \
    $((BATCH * LENGTH)) >"$file" <<'END' || { rm -f "$file"; return 1; }
import json, sys
file, seconds, tokens = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
try:
    last = [json.loads(line) for line in open(file)][-1]["tokens_per_second"]
except (OSError, IndexError, KeyError):
    sys.exit("no step was timed")
print(max(2, round(last * seconds / tokens)))
END
  cat "$file"
}

# The closed form solves small systems on the host. Three runs at once on 16 cores, each with a thread
# a core, did not come to an end of that in two minutes; with two threads each, in seconds.
export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-2}
export -f join prepare_all train
export OUT WORK GIVEN MODEL DATA LENGTH BATCH VALIDATION PYTHON QUICK=${QUICK:-} TEXT=${TEXT:-} GRACE=20

for part in $PARTS; do
  method=${part#speed_}
  rate=$([ "$method" = dmc ] && echo 5e-3 || echo 3e-3)
  case $part in
    environment) environment ;;
    model) limited $((30 * SLOW)) model bash -c join ;;
    data) limited $((60 * SLOW)) data bash -c prepare_all ;;
    speed_dms | speed_dmc)
      limited $((120 * SLOW)) "$part" bash -c "train $part $method 2 $TIMED --config.log_every=$((TIMED / 2))" ;;
    dms | dmc)
      steps=$(steps_of "$part") || { echo "== $part: speed_$part comes first" >&2; continue; }
      limited $(((DISTILL_SECONDS + 150) * SLOW)) "$part" bash -c \
        "train $part $part $WINDOWS $steps --config.distill.learning_rate=$rate" &&
        cp "$OUT/runs/$part/gates.safetensors" "$OUT/smollm2_135m_$part.safetensors" ;;
    measure)
      ls "$OUT"/smollm2_135m_d*.safetensors >/dev/null || continue
      limited $((120 * SLOW)) measure $PYTHON -m dmc_jax.arena --config=arena_smollm2 \
        --config.checkpoint="$MODEL" --config.text.data="$DATA" --config.text.split=test \
        --config.gates="$(ls "$OUT"/smollm2_135m_d*.safetensors | paste -sd,)" --config.contests=text \
        "${MEASURED[@]}" --config.output="$OUT" --config.name=arena ;;
    *) echo "no part '$part'" >&2; exit 2 ;;
  esac
done
