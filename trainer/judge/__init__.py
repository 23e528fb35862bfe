"""Evaluations of any model beside its training: a file each, and one table of models (python -m trainer.judge)."""
