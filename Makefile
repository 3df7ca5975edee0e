# Every target builds `.venv` first when it is missing or older than the requirements.
# Another interpreter: `make venv PYTHON=/path/to/python3.12` (Python 3.11 or 3.12).

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.requirements-installed
CANDIDATES := $(PYTHON) python3.12 python3.11 python3

# The packages are used from the checkout, so that scripts in experiments/ find them uninstalled.
export PYTHONPATH := $(CURDIR)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Most of a test's time is compilation, on one core; a file's tests share what its fixtures made.
# A process that crashes ends the run: another in its place waits for ever (pytest-xdist 3.8).
PARALLEL := --numprocesses 2 --dist loadfile --max-worker-restart 0

.DEFAULT_GOAL := test
.PHONY: venv demo demo-train test cuda-plugin test-all notebooks gpu gpu-quick lint clean

venv: $(STAMP)

demo: $(STAMP)
	$(VENV_PYTHON) experiments/demo.py

# The paper's recipe in small: from nothing to a million parameters that merge.
demo-train: $(STAMP)
	$(VENV_PYTHON) experiments/demo_train.py

# What can run outside of a checkout. Cells that did not change keep their ids, so a second `make
# notebooks` changes nothing; outputs are not kept.
notebooks: $(STAMP)
	$(VENV_PYTHON) -m jupytext --quiet --update --to notebook --update-metadata \
	  '{"jupytext": null, "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}' \
	  experiments/demo.py experiments/demo_train.py experiments/quickstart.py \
	  experiments/retrofit_on_a_laptop.py experiments/look_inside.py experiments/recall.py \
	  experiments/equal_bytes.py experiments/ablations.py experiments/gqa_and_dmc.py

test: $(STAMP)
	$(VENV_PYTHON) -m pytest $(PARALLEL) -m "not slow"

# What `plan` compiles with for GPUs that are not here; it finds it there.
cuda-plugin: $(STAMP)
	$(VENV_PYTHON) -m pip install --quiet --no-deps --upgrade --target $(VENV)/cuda-plugin \
	  $(foreach package,plugin pjrt,"jax-cuda12-$(package)==$$($(VENV_PYTHON) -c 'import jax; print(jax.__version__)')") \
	  nvidia-cuda-nvcc-cu12

# With JAX's CUDA plugin jax-triton can be imported, and so its kernels lowered, where there is no GPU;
# and whole programs are compiled for one that is only described.
# So they are for a TPU, by the libtpu that JAX asks for.
# Both lie apart: wherever JAX finds them, they complain on every start that there is none.
# What `make test` runs is compiled as in real runs here; there, as in the slow tests, LLVM's
# optimizations are left out.
test-all: $(STAMP) cuda-plugin
	$(VENV_PYTHON) -m pip install --quiet --requirement requirements-parity.txt
	PYTHONPATH="$(CURDIR):$(CURDIR)/$(VENV)/cuda-plugin" JAX_DISABLE_MOST_OPTIMIZATIONS=0 \
	  $(VENV_PYTHON) -m pytest tests/pallas_kernels/lowering_test.py \
	  tests/pallas_kernels/cache_update/compile_test.py tests/pallas_kernels/gpu_program_test.py
	$(VENV_PYTHON) -m pip install --quiet --no-deps --upgrade --target $(VENV)/libtpu "$$($(VENV_PYTHON) -c \
	  'from importlib.metadata import requires; print(*(x.split(";")[0] for x in requires("jax") if x.startswith("libtpu")))')"
	PYTHONPATH="$(CURDIR):$(CURDIR)/$(VENV)/libtpu" \
	  $(VENV_PYTHON) -m pytest tests/pallas_kernels/tpu_program_test.py
	$(VENV_PYTHON) -m pytest $(PARALLEL) -m slow
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(VENV_PYTHON) -m pytest $(PARALLEL) -m "not slow"

# On a machine with an NVIDIA GPU: tests of the kernels on it, then the benchmarks; docs/gpu.md.
# PYTHON_GPU: an interpreter that has all it needs, then no .venv is made; PACKAGES: a folder of more.
# That one's versions are not ours, so their warnings are no errors. What only compiles for GPUs is
# left to the other targets; the rest compiles too, in processes that share the GPU's memory.
GPU_RUN = JAX_PLATFORMS=cuda,cpu PYTHONPATH="$(CURDIR)$(if $(PACKAGES),:$(abspath $(PACKAGES)))" \
  $(or $(PYTHON_GPU),$(VENV_PYTHON))

GPU_CHECK = $(GPU_RUN) -c 'import jax; jax.devices("gpu")' >/dev/null 2>&1 || { \
  echo "make: JAX sees no NVIDIA GPU with $(or $(PYTHON_GPU),$(VENV_PYTHON)): it needs one, and JAX with CUDA (docs/gpu.md)" >&2; exit 1; }

gpu: $(if $(PYTHON_GPU),,$(STAMP))
	@$(GPU_CHECK)
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(GPU_RUN) -m pytest -W default --numprocesses 4 \
	  --dist worksteal --ignore-glob='*compile_test.py' tests/pallas_kernels
	$(GPU_RUN) -m pallas_kernels.bench --tune
	$(GPU_RUN) -m pallas_kernels.bench
	$(GPU_RUN) -m benchmarks.cache_update --tune
	$(GPU_RUN) -m benchmarks.end_to_end
	$(GPU_RUN) -m benchmarks.prefill_attention --tune
	$(GPU_RUN) -m benchmarks.training_attention --tune
	$(GPU_RUN) -m benchmarks.training_attention

# The figures that matter most in ten minutes, into OUT; a second call goes on.
gpu-quick: $(if $(PYTHON_GPU),,$(STAMP))
	@test -n "$(OUT)" || { echo "make: name a folder for the results: make gpu-quick OUT=DIR" >&2; exit 1; }
	@$(if $(QUICK),,$(GPU_CHECK))
	PYTHON="$(abspath $(or $(PYTHON_GPU),$(VENV_PYTHON)))" \
	  PYTHONPATH="$(if $(PACKAGES),$(abspath $(PACKAGES)))" benchmarks/gpu_quick.sh "$(OUT)" $(PARTS)

lint: $(STAMP)
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m ruff check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A candidate is run, not just looked up: version managers leave launchers behind that only fail.
# An existing .venv is kept and brought up to date, unless its own interpreter no longer runs.
$(STAMP): requirements.txt requirements-serve.txt requirements-dev.txt
	@if ! $(VENV_PYTHON) -c "" 2>/dev/null; then \
	  for candidate in $(CANDIDATES); do \
	    if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
	        >/dev/null 2>&1; then python=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "make: no working Python 3.11 or 3.12 among: $(CANDIDATES); install one, or name it: make venv PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  echo "creating $(VENV) with $$python ($$($$python --version))"; \
	  $$python -m venv --clear $(VENV); \
	fi
	$(VENV_PYTHON) -m pip install --quiet --requirement requirements-dev.txt
	@touch $@
