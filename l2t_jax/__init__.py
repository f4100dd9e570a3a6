"""Learning What and Where to Transfer, in functional JAX."""
