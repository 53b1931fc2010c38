"""The same job on other frameworks, for `python -m scripts.benchmark --only peers` and for anyone to check."""
