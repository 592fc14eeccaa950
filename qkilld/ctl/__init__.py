"""qkillctl, the command line client. Entry point: `main.main`."""
