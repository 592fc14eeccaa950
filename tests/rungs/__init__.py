"""The flush before SIGTERM and the yank before SIGKILL, with real QEMUs and real storage."""
