"""Recommendations from a recorded run: a clip threshold and a weight decay, each with its reasoning and its source."""
