"""Policies and losses that research compares the controller with; `budgetvlm compare` does not need them.

`benchmarks.rivals.entries.RIVALS` has them all, and `benchmarks/compare_all.py` compares them. The bandit
needs `pip install vowpalwabbit`; without it its row says "not installed".
"""
