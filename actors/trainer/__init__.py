"""Trainer ranks: an actor with a DeepSpeed or raylign engine each, and the group of all of them."""
