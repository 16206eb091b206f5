"""Identity: certificate authority and the names inside certificates."""
