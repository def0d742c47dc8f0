"""From result files to training data: join, split, extract features."""
