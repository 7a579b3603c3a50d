"""Params and shadows on disk: writing, finding, verifying and restoring them."""
