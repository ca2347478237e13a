"""Microbenchmarks of crrcd_ext against plain PyTorch: `python -m bench --help`."""
