"""Policies and losses that research compares the controller with; `budgetvlm compare` does not need them.

`benchmarks.rivals.entries.RIVALS` has them all, and `benchmarks/compare_all.py` compares them. Logistic regression and
boosted trees need `pip install scikit-learn`, the bandit `pip install vowpalwabbit`; without these packages their rows
say "not installed".
"""
