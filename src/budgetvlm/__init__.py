"""BudgetVLM: make a vision-language model answer within a latency budget, as accurately as possible."""

__version__ = "0.1.0"
