"""Other people's models on this package's operators: which stock functions are replaced, and by what."""
