"""On the real clock: calibrate a guard, evaluate the whole system, replay measured requests."""
