"""Preference data: read from any usual format, checked row by row, prepared, and put into tokens."""
