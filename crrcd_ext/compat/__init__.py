"""Losses under the names, arguments and checkpoints of public training code."""
