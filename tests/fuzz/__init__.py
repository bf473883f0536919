"""A fuzzer for everything that a user or stranger can hand over; ``scripts/fuzz.py`` runs it.

``material`` makes valid inputs, ``mutate`` damages them, ``targets`` use them as EchoStream does, ``runner`` counts
what comes of it. A case is a kind and a number: the same case is the same input, on any machine.
"""
