"""Channels, heads and features taken out of a model, and what says which."""
