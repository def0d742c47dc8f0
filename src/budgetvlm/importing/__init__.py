"""Results that other programs measured, made into a profile table."""
