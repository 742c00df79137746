"""Helpers below all other packages: memory, files, images, provenance, registries and text specifications."""
