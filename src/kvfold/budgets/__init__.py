"""How many tokens each layer and head may keep."""

from kvfold.budgets.allocate import Budget, allocate, check_budget, round_shares

__all__ = ["Budget", "allocate", "check_budget", "round_shares"]
