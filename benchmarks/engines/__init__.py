"""Real engines: an environment for vLLM, small models on disk, and what steering them costs and brings."""
