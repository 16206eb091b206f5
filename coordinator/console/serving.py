"""The console in the coordinator's process: one thread for the pages, one for what is new."""

from collections.abc import Callable, Mapping

from coordinator.admission import Members
from coordinator.artifacts import Artifacts
from coordinator.config import CoordinatorConfig
from coordinator.console.app import build
from coordinator.console.desk import Desk
from coordinator.console.news import News
from coordinator.presence import Seen
from coordinator.research_service import ResearchService
from coordinator.store import Store
from web.server import WebServer


class Console:
    """Serves from start() until stop().

    Raises: OSError when the port is taken, or the data folder takes no file.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        store: Store,
        artifacts: Artifacts,
        research: ResearchService,
        attending: Callable[[], Mapping[str, Seen | None]],
        members: Members,
    ) -> None:
        """Args: members: not the wire's own: its limits are counted in one event loop."""
        assert config.console is not None
        desk = Desk(
            config=config,
            store=store,
            artifacts=artifacts,
            research=research,
            attending=attending,
            members=members,
        )
        self._news = News(store)
        wanted = config.console
        self._server = WebServer(
            build(desk, self._news), wanted.listen, certificate=wanted.certificate, key=wanted.key
        )
        self.url = wanted.origin or self._server.url

    def start(self) -> None:
        """Begin to answer."""
        self._news.start()
        self._server.start()

    def stop(self) -> None:
        """End the streams, then the rest."""
        self._news.stop()
        self._server.stop()
