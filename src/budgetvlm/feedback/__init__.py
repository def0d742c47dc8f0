"""What served requests were worth: a store of them and of their scores, and what these say of other policies."""
