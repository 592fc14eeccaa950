"""Find QEMU's monitor and the guest agent, prove to which guest they belong, and talk to them."""
