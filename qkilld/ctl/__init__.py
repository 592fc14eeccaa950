"""qkillctl: the client for people and scripts. Entry point: `main.main`."""
