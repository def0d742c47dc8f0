"""Work on several machines: which worker gets what, and the one module that knows Ray."""
