r"""Analyze text without a model: character spans of tokens and words, parts of speech, named categories."""
