"""Measuring: quality and latency of what was translated. Nothing here is needed to translate."""
