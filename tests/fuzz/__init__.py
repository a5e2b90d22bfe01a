"""Every format that raylign reads, given inputs that nobody meant."""
