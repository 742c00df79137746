"""Tiny models with random weights, and other helpers of the tests."""
