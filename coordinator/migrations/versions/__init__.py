"""The revisions; each file says in one line why it exists."""
