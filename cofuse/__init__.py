"""The front door: command line, SDK for researchers, and the demo."""
