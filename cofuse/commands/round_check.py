"""`cofuse round check | lock`: what a round would cost, who would refuse it, what it stands on."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cofuse.commands.connection import At, Identity, Spec, answer, connected, fail, say, tell

if TYPE_CHECKING:
    from cofuse.round_cost import Cost, Done
    from cofuse.round_lock import Loaded
    from cofuse.round_policy import Verdict
    from cofuse.sdk import Coordinator
    from protos.spec import RoundSpec


@dataclass(frozen=True, slots=True)
class _Checked:
    """All that was found out."""

    loaded: "Loaded"
    cost: "Cost | None"
    """None: the round reads no prompt set that is here."""
    domains: tuple[str, ...]
    verdicts: tuple["Verdict", ...]
    beyond: str
    """What a policy that nobody has changed would refuse."""
    online: dict[str, Any] | None
    """What the coordinator knows; None when it was not asked."""

    def facts(self) -> dict[str, Any]:
        """For a program."""
        spec = self.loaded.spec
        return {
            "name": spec.name,
            "kind": spec.kind,
            "method": spec.method,
            "participants": list(spec.participants),
            "cost": asdict(self.cost) if self.cost else None,
            "domains": list(self.domains),
            "policies": [asdict(verdict) for verdict in self.verdicts],
            "beyond_the_usual": self.beyond,
            "coordinator": self.online,
        }


def check(
    spec: Spec,
    at: At,
    identity: Identity,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="tokenizer.json or a model's folder: positions are counted, not guessed."
        ),
    ] = None,
    policy: Annotated[
        list[Path], typer.Option(help="A participant's policy.toml to ask; may be said again.")
    ] = [],  # noqa: B006 - typer copies it
    submitter: Annotated[str, typer.Option(help="Who would submit it, for --policy.")] = "",
    online: Annotated[
        bool, typer.Option("--online", help="Ask the coordinator: pivot, members, past rounds.")
    ] = False,
) -> None:
    """Say what a round would cost each participant, and which policy would refuse it; send nothing.

    Exit 2: the spec or a file is wrong (file, line, cure). 5: a policy that was named refuses it.
    """
    from cofuse.round_lock import load_round

    loaded = load_round(spec)
    done: list[Done] = []
    asked = None
    if online:
        with connected(at, identity) as coordinator:
            asked, done = _ask(coordinator, loaded)
    found = _look(loaded, tokenizer, policy, submitter, asked)
    _show(spec, found, done)
    if refusals := [verdict for verdict in found.verdicts if not verdict.allowed]:
        words = "; ".join(f"{one.policy} refuses it: {one.says}" for one in refusals)
        fail(words, code="policy_refused", data=found.facts())
    answer(found.facts())


def lock(
    spec: Annotated[str, typer.Argument(help="A round spec, or the id of a published round.")],
    at: At,
    identity: Identity,
    out: Annotated[
        Path | None, typer.Option(help="Default: round.lock.yaml beside the spec.")
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Ask no coordinator; the pivot is not pinned.")
    ] = False,
) -> None:
    """Write round.lock.yaml: every digest that the round stands on.

    Submitted, it makes the very round again, or says what is not as it was.
    """
    from cofuse.round_lock import LOCK_FILE, lock_of, lock_of_round

    path = Path(spec)
    if path.is_file() and offline:
        made = lock_of(path, None)
    else:
        with connected(at, identity) as coordinator:
            made = (
                lock_of(path, coordinator) if path.is_file() else lock_of_round(spec, coordinator)
            )
    out = out or (path.with_name(LOCK_FILE) if path.is_file() else Path(LOCK_FILE))
    out.write_text(made.yaml(), encoding="utf-8")
    tell(out)
    answer({"lock": str(out), **made.model_dump(mode="json", exclude_none=True)})


def _look(
    loaded: "Loaded",
    tokenizer: Path | None,
    policies: list[Path],
    submitter: str,
    online: dict[str, Any] | None,
) -> _Checked:
    from cofuse.round_cost import cost_of
    from cofuse.round_policy import beyond_the_usual, judge
    from protos.chunks import sha256_of
    from protos.public_sets import read_evals

    spec, cost = loaded.spec, None
    domains: tuple[str, ...] = ()
    if spec.evals and not spec.evals.startswith("sha256:"):
        domains = tuple(read_evals(loaded.folder / spec.evals).domains)
    key = "pairs" if spec.pairs else "prompts"
    if spec.public_set and not spec.public_set.startswith("sha256:"):
        file = loaded.folder / spec.public_set
        cost = cost_of(spec, _asked_about(spec, file), tokenizer)
        spec = spec.model_copy(update={key: f"sha256:{sha256_of(file)}"})
    verdicts = tuple(judge(path, spec, cost, submitter) for path in policies)
    return _Checked(loaded, cost, domains, verdicts, beyond_the_usual(spec, cost), online)


def _asked_about(spec: "RoundSpec", file: Path) -> list[str]:
    """The texts of which something is told: documents, or the answers of pairs."""
    from fusion.pair_file import counts, read_pairs
    from protos.public_sets import read_prompts

    if spec.kind != "pairs":
        return read_prompts(file)
    found = read_pairs(file)
    found.held_out(spec.preference.held_out, spec.seed)  # raises when it leaves none to learn from
    for reason, number in counts(found.skipped).items():
        say(f"{file}: skipped {number}: {reason} (line {found.skipped[reason][0]})")
    return [answer for pair in found.pairs for answer in (pair.chosen, pair.rejected)]


def _ask(coordinator: "Coordinator", loaded: "Loaded") -> tuple[dict[str, Any], list["Done"]]:
    """What the coordinator knows of the names in the spec, and of rounds like it."""
    import difflib

    from cofuse.round_cost import done_before

    spec = loaded.spec
    loaded.require_pivot(coordinator)
    pivots = [pivot.name for pivot in coordinator.pivots()]
    members = coordinator.participants()
    for what, name, known in (
        ("pivot", spec.pivot, pivots),
        *(("participants", name, list(members)) for name in spec.participants),
    ):
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"
            )
            code = "unknown_pivot" if what == "pivot" else "unknown_participant"
            fail(f"{what}: the coordinator knows no {name!r}; {hint}", 2, code=code)
    alike = [r for r in coordinator.rounds() if r.final and r.spec.kind == spec.kind]
    wanted = set(spec.participants)
    recent = [r for r in alike if wanted & {p.participant for p in r.contributions}][-5:]
    done = done_before((r, list(coordinator.events(r.round_id))) for r in recent)
    attending = {name: members[name] for name in spec.participants}
    told = {name: asdict(done[name]) for name in spec.participants if name in done}
    return {"attending": attending, "done_before": told}, [
        done[name] for name in spec.participants if name in done
    ]


def _show(path: Path, found: _Checked, done: list["Done"]) -> None:
    spec = found.loaded.spec
    if found.cost is not None:
        what = "pairs: {:,} answers" if spec.kind == "pairs" else "prompts: {:,} documents"
        tell(f"{what.format(found.cost.documents)}, {found.cost.text_bytes:,} bytes")
    if found.domains:
        tell(f"evals: {', '.join(found.domains)}")
    tell(f"{path}: a valid {spec.kind} round, {spec.method}, for {', '.join(spec.participants)}")
    for line in _asked(spec, found.cost):
        tell(line)
    for one in done:
        tell(f"  {one.participant} took {one.minutes:.1f} minutes for {one.round_id}")
    if found.online is None:
        tell("  minutes: --online tells what rounds like it took")
    elif absent := [name for name, here in found.online["attending"].items() if not here]:
        tell(f"not here now: {', '.join(absent)}")
    for verdict in found.verdicts:
        word = "allows it by" if verdict.allowed else "REFUSES it:"
        tell(f"{verdict.policy}: {word} {verdict.says}")
    if found.beyond and not found.verdicts:
        tell(f"a policy with the usual limits refuses it: {found.beyond}")


def _asked(spec: "RoundSpec", cost: "Cost | None") -> Iterator[str]:
    """What each participant has to give."""
    if spec.kind == "weights":
        yield "each participant ships a delta of the pivot, as large as the pivot at most"
    elif cost is not None:
        how = "by this tokenizer" if cost.exact else "by its tokenizer; --tokenizer counts"
        yield f"each participant: {_range(cost.positions)} positions, {how}"
        if not cost.exact:
            yield f"  a tokenizer of a few hundred ids: up to {cost.positions_bound:,}"
        if cost.ship_bytes:
            shipped = _range(cost.ship_bytes)
            words = "" if spec.kind == "pairs" else ", and its vocabulary"
            yield f"  ships {shipped} bytes of log-probabilities{words}"
    if spec.trains_locally:
        asked = spec.grow or spec.training
        tokens = asked.steps * asked.batch_size * asked.seq_len
        yield f"  trains a copy of the pivot: {asked.steps:,} steps, {tokens:,} tokens of its text"


def _range(pair: tuple[int, int]) -> str:
    few, many = pair
    return f"{few:,}" if few == many else f"{few:,} to {many:,}"
