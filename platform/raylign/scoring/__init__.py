"""Scorers judge completions. They never invent a value: what they cannot judge is unscored, with a reason.

Every scoring process imports this, and little else: import what you need by the name of its module.
"""
