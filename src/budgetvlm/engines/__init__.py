"""The model under control where somebody else serves it: the `VLM` protocol over HTTP, for one engine or a fleet."""
