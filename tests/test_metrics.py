"""Figures of a run against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fedkd.metrics import costs, decile


@pytest.mark.parametrize(
    ("clients", "tenth"), [(1, 1), (6, 1), (10, 1), (11, 2), (20, 2), (25, 3), (100, 10), (101, 11)]
)
def test_a_tenth_is_rounded_up_to_whole_clients(clients: int, tenth: int) -> None:
    """At 20 and 100 clients there is nothing to round."""
    accuracies = np.random.default_rng(0).permutation(np.arange(clients) / clients)
    assert decile(accuracies, worst=True) == pytest.approx((tenth - 1) / 2 / clients)
    assert decile(accuracies, worst=False) == pytest.approx((clients - 1 - (tenth - 1) / 2) / clients)


def test_a_target_costs_what_was_sent_until_it_is_reached() -> None:
    """Bytes of all rounds up to the first evaluated one that is there; falling back later does not matter."""
    curve = pd.Series([0.2, 0.5, 0.4], index=[2, 4, 6])
    sent = pd.DataFrame({"round": [1, 2, 2, 3, 4, 5], "bytes_down": [1, 2, 3, 4, 5, 6], "bytes_up": [10] * 6})
    assert costs(curve, sent, [0.5, 0.2, 0.2, 0.51]) == {
        "0.2": {"round": 2, "bytes": 36},
        "0.5": {"round": 4, "bytes": 65},
        "0.51": None,
    }
