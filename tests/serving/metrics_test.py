"""What Prometheus is shown of sequences that ended."""

import dataclasses

from dmc_jax.inference.requests import Event, Result
from dmc_jax.serving.metrics import Metrics


def drafts_are_counted_test():
    metrics = Metrics()
    for drafted, accepted in ((9, 4), (3, 0)):
        result = Result("a", (1,), "length", 2, 1, None, 0, 0, 0, None, 0.0)
        told = {"drafted_tokens": drafted, "accepted_tokens": accepted}
        metrics.heard(Event(0, (), "", "length", dataclasses.replace(result, **told)), None)
    text = metrics.text().decode()
    assert "dmc_drafted_tokens_total 12.0" in text
    assert "dmc_accepted_draft_tokens_total 4.0" in text
