"""What is sampled: decoding options and seeds, prompts that are worth it, further attempts."""
