"""How many operators must say yes to a pivot, and who has."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
_COLUMNS = (("promotions_needed", sa.Integer, "0"), ("promotions_json", sa.Text, "{}"))


def upgrade() -> None:
    """Let every pivot of an older release be used as before: it needs nobody's yes."""
    for name, kind, default in _COLUMNS:
        op.add_column("pivots", sa.Column(name, kind, nullable=False, server_default=default))
