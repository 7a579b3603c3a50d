"""The demo: a classifier of handwritten digits, trained, saved and restored."""
