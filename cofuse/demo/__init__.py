"""One command that runs a whole federation on this machine."""
