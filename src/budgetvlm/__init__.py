"""BudgetVLM: make a vision-language model answer within a latency budget, as accurately as possible."""

from budgetvlm._version import __version__ as __version__
