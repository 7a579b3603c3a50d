"""Pytrees: names of leaves, which are averaged, pairs that match, renaming."""
