"""The demonstration: a real guest, killed at one site, recovered at the other."""
