"""Whole residual blocks taken out, and layers narrowed behind an adapter."""
