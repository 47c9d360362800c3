"""Many runs from one command: which they are, where each finds a device, how they ended, and searches among settings."""
