"""A pivot that waits for operators is used by nobody; so many different ones let it go."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from coordinator.fsck_audit import read_audit
from coordinator.promotion import NEEDED, promote, require_promoted, require_released
from protos.errors import CofuseError
from tests.coordinator.test_signing import Hub
from trust.identity import Identity
from trust.pivot_manifest import utc
from trust.statements import Promotion


class Site(Hub):
    """pivot-1 of a round that x submitted, waiting; pivot-0 is of a time before."""

    def __init__(self, root: Path, promotion: str) -> None:
        super().__init__(root)
        self.unsigned("pivot-0")
        self.store.promotions_needed = NEEDED[promotion]
        self.published()
        self.signer.renew()

    def say(self, name: str, pivot: str = "pivot-1", content: str = "") -> int:
        """How many more are wanted, once this operator has said yes."""
        manifest, by = self.manifest(pivot), Identity("operator", name)
        promotion = Promotion(
            sha256=content or manifest.content_sha256,
            pivot=pivot,
            by=by.uri,
            issued=utc(datetime.now(UTC)),
        )
        return promote(self.store, manifest, promotion, by, "{}").waits_for

    def refused(self, name: str, **what: str) -> str:
        with pytest.raises(CofuseError) as error:
            self.say(name, **what)
        return error.value.error_id


def test_two_different_operators_are_two_and_one_twice_is_one(tmp_path: Path) -> None:
    site = Site(tmp_path, "two")
    with pytest.raises(CofuseError, match="2 more operators"):
        require_promoted(site.store.pivot("pivot-1"))
    assert [site.say("grace"), site.say("grace")] == [1, 1]
    with pytest.raises(CofuseError, match="1 more operator; said so far by grace"):
        require_promoted(site.store.pivot("pivot-1"))
    assert site.say("heinz") == 0
    require_promoted(site.store.pivot("pivot-1"))
    assert site.store.pivot("pivot-1").promoted_by == ("grace", "heinz")
    with site.store.database.read() as db:
        assert not [says for _, says in read_audit(db, None).unauthorised if "promoted" in says]


def test_where_one_is_enough_it_is_not_whoever_submitted_the_round(tmp_path: Path) -> None:
    site = Site(tmp_path, "one")
    assert site.refused("x") == "own_round"
    assert site.say("grace") == 0


def test_a_yes_is_to_one_content_and_to_a_pivot_that_waits(tmp_path: Path) -> None:
    site = Site(tmp_path, "two")
    assert site.refused("grace", content="f" * 64) == "bad_request"
    assert site.refused("grace", pivot="pivot-0") == "wrong_state"
    assert site.store.pivot("pivot-1").promoted_by == ()


def test_what_was_published_before_is_used_as_before_and_its_files_too(tmp_path: Path) -> None:
    site = Site(tmp_path, "two")
    require_promoted(site.store.pivot("pivot-0"))
    old, new = (
        next(f for f in site.store.pivot(name).files if f.name == "model.safetensors")
        for name in ("pivot-0", "pivot-1")
    )
    require_released(site.store.database, old.sha256)
    with pytest.raises(CofuseError, match="pivot-1 waits"):
        require_released(site.store.database, new.sha256)


def test_going_back_is_one_yes_and_the_coordinators_own_doing_is_none(tmp_path: Path) -> None:
    site = Site(tmp_path, "two")
    made = site.signer.roll_back("pivot-1", Identity("operator", "grace").uri)
    assert (made.waits_for, made.promoted_by) == (1, ("grace",))
    assert site.say("heinz", pivot=made.name) == 0
    other = site.signer.roll_back(made.name)
    assert (other.waits_for, other.promoted_by) == (2, ())
