"""Parts of `python -m scripts.benchmark`: what each measures, and the stage that they play on."""
