"""The checks of self_check.py, one file for each part of the assignment. They need only torch."""
