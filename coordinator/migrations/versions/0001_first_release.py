"""The tables of release 0.1."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make all tables."""
    op.create_table(
        "participants",
        sa.Column("name", sa.String(40), primary_key=True),
        sa.Column("node_id", sa.String(24), nullable=False),
        sa.Column("public_key", sa.LargeBinary, nullable=False),
        sa.Column("joined_unix_ms", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "rounds",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("request_id", sa.String(120), unique=True, nullable=False),
        sa.Column("submitted_by", sa.String(40), nullable=False),
        sa.Column("spec_json", sa.Text, nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("created_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("deadline_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("pivot_name", sa.String(20), nullable=False),
    )
    op.create_table(
        "contributions",
        sa.Column("round_id", sa.String(20), primary_key=True),
        sa.Column("participant", sa.String(40), primary_key=True),
        sa.Column("status", sa.String(12), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("committed_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("report_json", sa.Text, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("round_id", sa.String(20), nullable=False, index=True),
        sa.Column("time_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("body_json", sa.Text, nullable=False),
    )
    op.create_table(
        "artifacts",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(40), primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "pivots",
        sa.Column("name", sa.String(20), primary_key=True),
        sa.Column("parent", sa.String(20), nullable=False),
        sa.Column("round_id", sa.String(20), nullable=False),
        sa.Column("files_json", sa.Text, nullable=False),
        sa.Column("evals_json", sa.Text, nullable=False),
        sa.Column("created_unix_ms", sa.BigInteger, nullable=False),
    )
