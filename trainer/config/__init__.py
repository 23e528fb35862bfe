"""What a recipe and a DeepSpeed JSON can say, read and checked without torch."""
