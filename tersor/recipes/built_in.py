"""The recipes that come along, by name: what --help lists without importing what recipes are made of."""

BUILT_IN = ("balanced", "small", "fast", "sparse", "coarse-to-fine", "joint", "ptq")
