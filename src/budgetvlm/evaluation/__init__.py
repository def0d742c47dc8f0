"""What a policy is worth on held-out samples: under a ceiling, under a mean budget, with intervals."""
