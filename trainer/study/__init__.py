"""Experiments: a grid of recipe variants over seeds, run, resumed and summed up by `python -m trainer.study`."""
