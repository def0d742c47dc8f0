"""Serving: an OpenAI-compatible server that keeps each request's budget, also while others wait."""
