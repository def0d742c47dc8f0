"""The commands of `budgetvlm`. Each module has `add_arguments(parser)` and `run(args) -> int`."""
