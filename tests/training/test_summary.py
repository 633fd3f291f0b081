"""Means, paired differences with their interval, and the sentence that sums them up."""

from __future__ import annotations

import pytest

from klif_sj.training.reports.summary import Difference, conclusion, mean_and_deviation, paired_difference

pytestmark = pytest.mark.once


def test_mean_and_sample_deviation() -> None:
    assert mean_and_deviation([90.0]) == "90.00"
    assert mean_and_deviation([90.0, 92.0]) == "91.00 ± 1.41"


def test_the_interval_is_students() -> None:
    """Differences 1, 2, 3: the mean 2, its standard error 1 / sqrt(3), and 4.3027 for two degrees of freedom."""
    found = paired_difference({0: 91.0, 1: 93.0, 2: 95.0, 9: 0.0}, {2: 92.0, 1: 91.0, 0: 90.0, 7: 100.0})
    assert found is not None
    assert (found.mean, found.pairs) == (2.0, 3)
    assert (found.low, found.high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert str(found) == "+2.00 [-0.48, +4.48]"
    assert not found.is_clear


@pytest.mark.parametrize("ours", [{0: 91.0}, {0: 91.0, 1: 92.0}])
def test_one_pair_or_equal_differences_have_no_interval(ours: dict[int, float]) -> None:
    found = paired_difference(ours, {0: 90.0, 1: 91.0})
    assert found == Difference(1.0, None, None, len(ours))
    assert str(found) == ("+1.00" if len(ours) == 1 else "+1.00 in each pair")
    assert not found.is_clear


def test_without_a_common_seed_there_is_no_difference() -> None:
    assert paired_difference({0: 91.0}, {1: 90.0}) is None


def test_the_conclusion_says_what_is_supported_and_what_is_not() -> None:
    above, below = Difference(2.0, 1.0, 3.0, 3), Difference(-2.0, -3.0, -1.0, 3)
    unclear = Difference(2.0, -1.0, 5.0, 3)
    assert conclusion("lif", {}) == "There is nothing to compare lif with."
    assert conclusion("lif", {"klif": None}) == "There is nothing to compare lif with."
    assert conclusion("lif", {"klif": Difference(9.0, None, None, 1)}).startswith("One seed cannot tell")
    start = "Over 3 seeds, at this size and after this many epochs, the data"
    assert conclusion("lif", {"klif": unclear, "clif": unclear}) == (
        f"{start} do not say whether klif or clif is better or worse than lif."
    )
    assert conclusion("lif", {"klif": above, "clif": unclear, "glif": below}) == (
        f"{start} support that klif is 2.00 points above lif (95 % interval +1.00 to +3.00), that glif is 2.00 points "
        "below lif (95 % interval -3.00 to -1.00), and do not say whether clif is better or worse than lif."
    )
    equal = Difference(0.0, None, None, 3)
    assert conclusion("lif", {"klif": equal, "clif": unclear, "glif": equal}) == (
        f"{start} give klif and glif the accuracy of lif with every seed, and do not say whether clif is better or "
        "worse than lif."
    )
