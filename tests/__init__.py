"""The tests, one folder per package; helpers are in ``tests.testing``."""
