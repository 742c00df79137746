"""The mathematics of MSEA, ARC and TAM on plain tensors: aggregation, suppression, rank overlap, rasterization."""
