"""The rungs before SIGTERM and before SIGKILL, with real QEMUs and real storage."""
