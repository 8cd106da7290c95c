"""How a compressed model behaves beside its original: everything is a function of one pass of both over the data."""
