"""Experiments: many fusions that differ in a few settings, each scored on the test split, with seeds."""
