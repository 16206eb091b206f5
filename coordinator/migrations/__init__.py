"""How a database of an older release becomes one of this: alembic revisions, oldest first.

To change a table: edit coordinator/tables.py, then add versions/NNNN_words.py with the same change
(`op.add_column(...)` with a server_default, so that old rows get a value). The whole upgrade is one
transaction, on a copy-protected database: see coordinator/migrate.py.
"""
