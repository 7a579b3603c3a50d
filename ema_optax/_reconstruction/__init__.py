"""Averages put together after training, and chosen by their scores."""
