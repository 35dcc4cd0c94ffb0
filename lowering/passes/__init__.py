"""Passes over the graphs of models that know nothing of this package."""
