"""Discrete units of the target speech: features at 50 Hz, k-means, deduplication."""
