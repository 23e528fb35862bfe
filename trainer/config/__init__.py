"""What a recipe and a DeepSpeed JSON can say, read and checked without torch.

Sections of a recipe: data, student, phases (teacher to train), runtime (run, hub); recipe puts them together, and
knobs says what one key is. load reads recipes, ds_config the DeepSpeed JSON, redaction keeps secrets out of both.
"""
