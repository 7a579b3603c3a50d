"""The tests, their float64 reference and their shared training runs."""
