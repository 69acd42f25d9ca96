"""The checks of self_check.py, one file for each part of the assignment. Torch alone."""
