"""Policies and losses that research compares the controller with; `budgetvlm compare` does not need them."""
