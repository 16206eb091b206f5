"""The order that a round's submitter signed, and that of rounds by the calendar."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Leave it empty for what was submitted before: participants refuse such rounds."""
    for table in ("rounds", "recurring"):
        op.add_column(table, sa.Column("order_json", sa.Text, nullable=False, server_default=""))
