"""The commands of `budgetvlm`, a module each with a docstring, `add_arguments(parser)` and `run(args) -> int`."""
