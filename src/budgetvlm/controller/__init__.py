"""The controller: its network, its rewards, GRPO, training and checkpoints. Knows nothing of any model."""
