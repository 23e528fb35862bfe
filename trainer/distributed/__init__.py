"""Ranks, the DeepSpeed engine and its inner state, and stopping in time."""
