"""qkillctl: the client for people and scripts."""
