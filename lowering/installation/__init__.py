"""How Inductor learns of the operators: nothing is imported, nothing raises."""
