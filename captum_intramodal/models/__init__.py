"""A transformers model alone: families, decoder, hooks, logit lens, rankings."""
