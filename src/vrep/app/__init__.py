"""The edge: command line, daemon, status and the demonstration; nothing imports it."""
