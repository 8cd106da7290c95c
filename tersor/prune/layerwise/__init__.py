"""Layer by layer through the model: what is pruned is mended from activations."""
