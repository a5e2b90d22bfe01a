"""The scorer actor and its client."""
