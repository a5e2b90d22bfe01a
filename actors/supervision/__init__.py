"""Actors that end: noticed, explained, replaced, counted."""
