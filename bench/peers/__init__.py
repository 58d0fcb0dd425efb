"""The peers: how each is started, in its best tuning."""
