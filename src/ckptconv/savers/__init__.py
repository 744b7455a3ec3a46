"""Built-in savers, one module each."""
