"""Helpers that know neither models nor explanations: memory, files, images, text specifications."""
