"""Side by side with other tools, and masking beside its labels, run by hand: `python -m benchmarks.cleaning`."""
