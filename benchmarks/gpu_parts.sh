# What scripts for a GPU that is rented by the minute share: `source` it with the name of the script.
# Expects OUT, an existing folder, and PYTHON. QUICK: any device, small sizes.

export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
[ -n "${QUICK:-}" ] || export JAX_PLATFORMS=cuda,cpu
# What one part compiles, another finds.
export JAX_COMPILATION_CACHE_DIR=${XDG_CACHE_HOME:-$HOME/.cache}/dmc_jax/$1
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

# limited SECONDS NAME COMMAND...: its output in OUT/NAME.log, the end of it here. A command that is
# out of time may still write what it has.
limited() {
  local seconds=$1 name=$2 began=$SECONDS
  shift 2
  timeout --kill-after="${GRACE:-5}" "$seconds" "$@" >"$OUT/$name.log" 2>&1
  local status=$?
  echo "== $name: status $status after $((SECONDS - began)) s (at most $seconds)"
  grep -v -e Warning -e '^$' "$OUT/$name.log" | tail -n "${LINES_SHOWN:-12}" | cut -c1-300
  return $status
}

environment() { { nvidia-smi; $PYTHON -m pip list; nproc; } >"$OUT/environment.txt" 2>&1; }
