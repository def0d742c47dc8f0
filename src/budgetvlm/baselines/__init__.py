"""The policies of `budgetvlm.policies`, a small file a kind; what needs other libraries imports them when fitted."""
