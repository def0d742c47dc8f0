"""What a policy is worth on held-out samples: accuracy under a budget, and mean latency at equal accuracy."""
