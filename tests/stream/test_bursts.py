"""The budget of closer looks, on a fake clock."""

from stream.bursts import SPAN_S, BurstBudget
from stream.clock import FakeClock


def test_bursts_are_allowed_up_to_their_share_and_again_when_it_has_passed() -> None:
    clock = FakeClock()
    budget = BurstBudget(0.5, clock)
    for _ in range(50):
        assert budget.allows()
        budget.spend(0.1)
        clock.advance(0.1)
    assert budget.allows()
    budget.spend(0.1)
    assert not budget.allows()
    clock.advance(SPAN_S - 4.9)
    assert budget.allows()


def test_no_budget_means_no_second_burst() -> None:
    budget = BurstBudget(0.0, FakeClock())
    assert budget.allows()
    budget.spend(0.01)
    assert not budget.allows()
