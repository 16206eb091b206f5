"""Templates, static files and the words for numbers that pages share."""

import hashlib
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

_HERE: Final = Path(__file__).parent
_STATIC: Final = _HERE / "static"
_UNITS: Final = ((86_400, "d"), (3_600, "h"), (60, "min"))


class Pages:
    """Renders the templates of a folder; web/templates has what they are made of."""

    def __init__(self, folder: Path, **common: Any) -> None:
        """Args: common: names that every template knows."""
        self._environment = Environment(
            loader=ChoiceLoader([FileSystemLoader(folder), FileSystemLoader(_HERE / "templates")]),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.globals.update(asset=asset, **common)
        self._environment.filters.update(
            bytes=in_bytes, moment=moment, span=in_words, number=number, day=day
        )

    def html(self, name: str, status: int = 200, **values: Any) -> HTMLResponse:
        """One page."""
        text = self._environment.get_template(name).render(values)
        return HTMLResponse(text, status_code=status)


class Assets(StaticFiles):
    """/static: kept by browsers for a year, because asset() names a file by its content."""

    def __init__(self) -> None:
        super().__init__(directory=_STATIC)

    def file_response(self, *args: Any, **kwargs: Any) -> Any:
        """One file."""
        response = super().file_response(*args, **kwargs)
        response.headers["cache-control"] = "public, max-age=31536000, immutable"
        return response


@lru_cache
def asset(name: str) -> str:
    """Address of a static file; another content has another one."""
    return f"/static/{name}?{hashlib.sha256((_STATIC / name).read_bytes()).hexdigest()[:12]}"


def moment(unix_ms: int) -> Markup:
    """A time as the reader's clock shows it (live.js); without scripts, UTC."""
    if not unix_ms:
        return Markup('<span class="muted">never</span>')
    at = datetime.fromtimestamp(unix_ms / 1000, UTC)
    utc = at.strftime("%Y-%m-%d %H:%M:%S UTC")
    # Markup.format would escape what holds no character to escape: a fifth of a long page's time.
    return Markup(f'<time datetime="{at.isoformat()}" title="{utc}">{utc}</time>')  # noqa: S704


def day(unix_ms: int) -> str:
    """A date, UTC."""
    return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y-%m-%d")


def in_words(milliseconds: float) -> str:
    """A length of time: "12 min"; "3 min ago" is the caller's to add."""
    seconds = max(0, int(milliseconds)) // 1000
    size, unit = next(((s, u) for s, u in _UNITS if seconds >= 2 * s), (1, "s"))
    return f"{seconds // size} {unit}"


def in_bytes(count: float) -> str:
    """A size: "4.1 MB"."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def number(value: float, digits: int = 3) -> str:
    """A measured value."""
    return f"{value:,.{digits}f}"
