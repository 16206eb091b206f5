"""Leases and attempts of rounds, the experts' versions, and rounds that recur by the calendar."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add what older rounds never had: no lease, no attempt, no loss."""
    for table, name, kind in (
        ("rounds", "attempt", sa.Integer),
        ("rounds", "lease_unix_ms", sa.BigInteger),
        ("rounds", "losses", sa.Integer),
        ("contributions", "lease_unix_ms", sa.BigInteger),
    ):
        op.add_column(table, sa.Column(name, kind, nullable=False, server_default="0"))
    op.create_table(
        "experts",
        sa.Column("participant", sa.String(40), primary_key=True),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("changed_unix_ms", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "recurring",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("request_id", sa.String(120), unique=True, nullable=False),
        sa.Column("submitted_by", sa.String(40), nullable=False),
        sa.Column("spec_json", sa.Text, nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("due_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("last_round_id", sa.String(20), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
    )
