"""Tables and warnings say what was measured."""

import pytest

from dmc_jax.evaluation.perplexity import Evaluation
from dmc_jax.evaluation.tables import ComparisonRow, collapse, comparison_table


@pytest.mark.parametrize(
    "ratios, collapsed",
    [
        ([1.1, 4, 40.1], True),
        ([1.2, 4, 40.1], False),  # every layer merges
        ([1.1, 4, 40.0], False),  # none merges everything
        ([60, 60], False),
        ([1.0, 1.0], False),
    ],
)
def collapse_is_one_layer_idle_while_another_merges_all_test(ratios, collapsed):
    assert (collapse(ratios, target=4.0) is not None) == collapsed


def a_comparison_is_relative_to_its_first_row_test(model_config):
    def measured(loss, bits, ratio):
        return Evaluation(loss, 2.0, bits, 10, 1, ratio, (ratio,), ((ratio,),))

    table = comparison_table(
        [
            ComparisonRow("dense", 750, measured(2.0, 1.25, 1.0), model_config),
            ComparisonRow("DMC", 770, measured(2.1, 1.3, 4.0), model_config, "a note"),
        ]
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    # 256 tokens x 3 rows x 8 channels x keys and values x 2 bytes
    assert rows[2] == ["dense", "750", "2.0000", "1.2500", "", "1.00x", "24,576", ""]
    assert rows[3] == ["DMC", "770", "2.1000", "1.3000", "+4.00 %", "4.00x", "6,144", "a note"]
    assert len({len(line) for line in table.splitlines()}) == 1
