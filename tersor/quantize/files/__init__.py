"""Integers in files of weights, without the model."""
