"""Generators: an actor with a vLLM engine each."""
