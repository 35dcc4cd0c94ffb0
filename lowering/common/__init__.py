"""What the operators' lowerings share."""
