"""Capability before and after training: perplexity on texts, and questions answered by log-likelihood."""
