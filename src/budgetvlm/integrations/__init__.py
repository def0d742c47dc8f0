"""BudgetVLM inside other programs."""
