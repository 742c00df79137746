"""How an input and its arguments get to another scale, and attributions back."""
