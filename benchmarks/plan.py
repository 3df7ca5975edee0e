"""What the large recipes take of 8, 16, 64 and 256 H100: `python -m benchmarks.plan`.

Writes benchmarks/plan.json and prints the README's table of it: what `python -m dmc_jax.plan` says
of each, by XLA's compiler for GPUs that are not here (`make cuda-plugin`).
"""

import json
import sys
from pathlib import Path

from dmc_jax.config import RunConfig
from dmc_jax.errors import UserError
from dmc_jax.training import absent
from dmc_jax.training.plan import Machine, costs, plan

FILE = Path(__file__).parent / "plan.json"
RECIPES = {"7b": (2, 4, 8), "13b": (4, 8), "70b": (4,), "llama3_8b": (4,)}
GPUS = (8, 16, 64, 256)
MEMORY = int(79.1 * 2**30)


def recipe(model: str, ratio: int, gpus: int) -> RunConfig:
    """The recipe for so many GPUs, or, where it has none for them, as it is."""
    try:
        return RunConfig.named(f"paper:{model},ratio={ratio},gpus={gpus}")
    except UserError:
        return RunConfig.named(f"paper:{model},ratio={ratio}")


def table(plans: list[dict]) -> str:
    """Recipes by machines, as Markdown."""
    gpus = sorted({found["gpus"] for found in plans})
    rows = [
        "| recipe | tokens | dollars | " + " | ".join(f"{n} GPUs" for n in gpus) + " |",
        "|---|--:|--:|" + "--:|" * len(gpus),
    ]
    for name in dict.fromkeys(found["name"] for found in plans):
        by_gpus = {found["gpus"]: found for found in plans if found["name"] == name}
        one = next(iter(by_gpus.values()))
        cells = [f"{one['tokens'] / 1e9:.0f} G", f"${one['dollars']:,.0f}"]
        cells += [_cell(by_gpus[n]) if n in by_gpus else "" for n in gpus]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cell(found: dict) -> str:
    if found["fitting"] is None:
        return "does not fit"
    size = found["fitting"]["bytes"]["total"] / 2**30
    rate, days = found["tokens_a_second"] / 1e3, found["days"]
    return f"{size:.1f} GiB, {rate:,.0f}k tokens/s, {days:.1f} days"


def main() -> int:
    """Plan all recipes, print and write."""
    reason = absent.prepare()
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    plans = []
    for model, ratios in RECIPES.items():
        for gpus in GPUS if model == "70b" else GPUS[:-1]:
            machine = Machine(gpus, MEMORY)
            # Steps of all ratios are alike; there are more or fewer of them.
            found = plan(recipe(model, ratios[0], gpus), machine, compiled=True)
            for ratio in ratios:
                run = recipe(model, ratio, gpus)
                plans.append(found | {"name": run.name} | costs(run, found["stage"], machine))
            print(f"{model} on {gpus}: {_cell(found)}", flush=True)
    report = {"command": "python -m benchmarks.plan", "plans": plans}
    FILE.write_text(json.dumps(report, indent=1) + "\n")
    print(table(plans))
    return 0


if __name__ == "__main__":
    sys.exit(main())
