"""Saving and resuming inside a phase: the saver, the format, the writing thread, and looking inside."""
