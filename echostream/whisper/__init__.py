"""Whisper (Radford et al., 2022) as a starting point and a teacher: its weights, its tokens, the model itself.

``layouts`` (the files weights come in), ``weights`` (their neutral form), ``tokens`` (from its vocabulary to the
project's), ``reference`` (the full-context model in torch).
"""
