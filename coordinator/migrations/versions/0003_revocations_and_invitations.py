"""Certificates that count no more, and invitations that become certificates."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add both tables, empty: older coordinators revoked nothing and invited nobody."""
    op.create_table(
        "revocations",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("subject", sa.String(60), nullable=False),
        sa.Column("serial", sa.String(48), nullable=False),
        sa.Column("revoked_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("why", sa.Text, nullable=False),
    )
    op.create_table(
        "invitations",
        sa.Column("invitation", sa.String(16), primary_key=True),
        sa.Column("secret_sha256", sa.String(64), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("name", sa.String(40), nullable=False),
        sa.Column("created_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("expires_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("wrong_tries", sa.Integer, nullable=False),
        sa.Column("used_unix_ms", sa.BigInteger, nullable=False),
        sa.Column("request_sha256", sa.String(64), nullable=False),
        sa.Column("certificate_pem", sa.Text, nullable=False),
    )
