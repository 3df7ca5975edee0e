"""The quickstart, run as a program in an empty directory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def the_quickstart_trains_a_model_that_compresses_test(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}  # one device
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"  # it trains for longer than it compiles
    script = ROOT / "experiments" / "quickstart.py"
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    ratio = re.search(r"^DMC: .* ratio (\d+\.\d+)$", result.stdout, re.M)
    assert float(ratio[1]) > 1.5
    assert (tmp_path / "runs/quickstart/report/ratio_per_head.png").is_file()
