"""What carries messages between neighbouring stages."""
