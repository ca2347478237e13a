"""Shared by the tests: inputs of the operators, and how results are judged."""
