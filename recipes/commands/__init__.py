"""The `raylign` command."""
