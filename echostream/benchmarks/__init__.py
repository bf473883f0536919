"""What ``scripts/benchmark.py`` measures; see the modules."""
