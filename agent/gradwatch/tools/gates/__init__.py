"""Checks before a model goes out: what was recorded of it, what the policy asks, and what is said of the difference."""
