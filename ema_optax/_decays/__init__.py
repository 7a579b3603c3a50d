"""Decays by their exact logarithms, and what they average over."""
