"""Models that somebody else serves, one engine or a fleet, and features of a request without its model."""
