"""Zeros in weights: scores, patterns, scopes and the schedules that raise them."""
