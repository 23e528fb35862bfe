"""The one train loop and its step; they know no phase."""
