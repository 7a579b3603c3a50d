"""Bridges to model libraries and to the formats of others."""
