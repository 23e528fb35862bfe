"""The report of a run and the comparison of several: python -m trainer.report RUN_DIR [RUN_DIR2 ...]"""
