"""The shutdown matrix: stop guests in every state, and count the records on their disks."""
