"""The contract between the programs: messages, round specs, errors, chunk streams. A leaf."""
