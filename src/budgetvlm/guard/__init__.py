"""How long a request will take at each setting, and what its budget allows. Knows no controller."""
