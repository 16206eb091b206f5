"""Version 1 of the wire contract: .proto sources and the stubs made from them."""
