"""Checkpoint files of a directory or of the hub: found, checked, and read without running anything in them."""
