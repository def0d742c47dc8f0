"""Why the controller chose a setting."""
