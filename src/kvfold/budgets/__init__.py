"""How many tokens each layer and head may keep."""

from kvfold.budgets.allocate import Budget, allocate, check_budget, is_all, round_shares

__all__ = ["Budget", "allocate", "check_budget", "is_all", "round_shares"]
