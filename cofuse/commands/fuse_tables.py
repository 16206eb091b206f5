"""What `cofuse fuse` shows on a terminal: what a dry run found, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from cofuse.evals import MEASURES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDE: Final = 120
_TENSORS: Final = 40
"""Tensors a dry run lists on the terminal; --json has all."""


def open_console(*, to_stderr: bool) -> Console:
    """A console of the terminal's width; 120 columns where there is none."""
    from rich.console import Console

    console = Console(stderr=to_stderr, highlight=False)
    if console.is_terminal:
        return console
    return Console(stderr=to_stderr, highlight=False, width=_WIDE)


def show_facts(facts: Mapping[str, Any], console: Console) -> None:
    """Print what a dry run found."""
    if facts["pairs"] is not None:
        return _show_pairs(facts, console)
    table = _table("", "architecture", "parameters", "vocabulary", "tokens", "common", "1:1", "MB")
    pivot = facts["pivot"]
    rows = [{**pivot, "name": "pivot"}, *facts["sources"]]
    for row in rows:
        size = row.get("contribution_bytes")
        table.add_row(
            row["name"],
            row["architecture"] or row["kind"],
            *(_count(row.get(key)) for key in ("parameters", "vocabulary", "tokens")),
            *(_share(row.get(key)) for key in ("common", "one_to_one")),
            "" if size is None else f"{size / 1e6:,.1f}",
        )
    console.print(table)
    prompts, training = facts["prompts"], facts["training"]
    if prompts["documents"]:
        console.print(f"prompts: {prompts['documents']:,} documents, {prompts['bytes']:,} bytes")
    if training is not None:
        console.print(
            f"each run: {training['steps']:,} steps of {training['batch_size']} x "
            f"{training['seq_len']} tokens, {training['epochs']:.1f} times through the prompt set"
        )
    if facts["merge"] is not None:
        _show_merge(facts["merge"], console)
    console.print("nothing was written", markup=False)


def _show_pairs(facts: Mapping[str, Any], console: Console) -> None:
    """Print how each model reads the pairs."""
    told, training = facts["pairs"], facts["training"]
    counted = ("tokens", "chosen", "rejected", "longer", "agrees")
    table = _table("", "architecture", "parameters", "vocabulary", *counted)
    for row in ({**facts["pivot"], "name": "pivot", "pairs": told["pivot"]}, *facts["sources"]):
        read = row["pairs"]
        table.add_row(
            row["name"],
            row["architecture"] or row["kind"],
            *(_count(row.get(key)) for key in ("parameters", "vocabulary")),
            _count(read["tokens"]),
            *(f"{read[key]:.1f}" for key in ("chosen", "rejected")),
            _count(read["longer"]),
            _share(read["agrees"]),
        )
    console.print(table)
    console.print(f"pairs: {told['learned']:,} to learn from, {told['held_out']:,} held out")
    for words in skipped_lines(told):
        console.print(words, markup=False)
    console.print(
        f"each run: {training['steps']:,} steps of {training['batch_size']} pairs, "
        f"{training['epochs']:.1f} times through the pairs"
    )
    console.print("nothing was written", markup=False)


def skipped_lines(pairs: Mapping[str, Any] | None) -> list[str]:
    """What was left out of a file of pairs, a line of words for each reason."""
    return [
        f"skipped {row['lines']:,}: {row['reason']} ("
        f"line {', '.join(map(str, row['first']))}{', ...' * (row['lines'] > len(row['first']))})"
        for row in (pairs or {"skipped": ()})["skipped"]
    ]


def _show_merge(merge: Mapping[str, Any], console: Console) -> None:
    """Print what each source brings to the merge, in all and by tensor."""
    given = ", ".join(f"{key} {value:g}" for key, value in merge["parameters"].items())
    console.print(f"merge: {merge['method']}, weight {merge['weight']:g} {given}", markup=False)
    table = _table("source", "weight", "norm of delta", "cosine with the merged", "same signs")
    for name, row in merge["sources"].items():
        cells = [f"{row['effective_weight']:.3g}", f"{row['norm']:.4g}", f"{row['cosine']:.3f}"]
        table.add_row(name, *cells, f"{row['sign_share']:.1%}")
    console.print(table)
    sources = list(merge["sources"])
    shown = merge["tensors"][:_TENSORS]
    table = _table("tensor", "dtype", "shape", *sources)
    for row in shown:
        shape = " x ".join(map(str, row["shape"]))
        found = [row["sources"].get(name) for name in sources]
        cells = ["copied" if x is None else f"{x['norm']:.3g} / {x['cosine']:.2f}" for x in found]
        table.add_row(row["name"], row["dtype"], shape, *cells)
    console.print("norm of each source's delta / cosine with the merged, by tensor", markup=False)
    console.print(table)
    if more := len(merge["tensors"]) - len(shown):
        console.print(f"and {more} more; --json has all of them", markup=False)
    for note in merge["notes"]:
        console.print(f"note: {note}", markup=False)


def show_evals(evals: Mapping[str, Any], console: Console) -> None:
    """Print models by domains, as in the demo."""
    for key, title in MEASURES.items():
        scores = evals.get(key)
        if not scores:
            continue
        domains = list(next(iter(scores.values())))
        console.print(title, markup=False)
        table = _table("model", *domains, "mean")
        for model, by_domain in scores.items():
            values = [by_domain[domain] for domain in domains]
            cells = [f"{value:.3f}" for value in [*values, sum(values) / len(values)]]
            table.add_row(model, *cells, style="bold" if model == evals["pivot"] else None)
        console.print(table)
    if judged := evals["credit"].get("judgement"):
        _show_judgement(judged, console)
    if evals["bpb"]:
        pivot, base = evals["bpb"][evals["pivot"]], evals["bpb"]["base"]
        better = [domain for domain in pivot if pivot[domain] < base[domain]]
        console.print(
            f"{evals['pivot']} needs fewer bits than base on {len(better)} of {len(pivot)} domains"
        )


def _show_judgement(judged: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """Print how the sources judged the pairs that the pivot learned from."""
    console.print("how the sources judged the pairs", markup=False)
    table = _table("source", "agrees", "margin", "stronger", "share of the reference", "turned")
    for name, row in judged.items():
        shares = [_share(row[key]) for key in ("agrees", "stronger", "share")]
        margin, turned = f"{row['margin']:+.3f}", f"{row['turned']:.3g}"
        table.add_row(name, shares[0], margin, *shares[1:], turned)
    console.print(table)


def _table(first: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column(first, overflow="fold")
    for column in columns:
        left = column == "architecture"
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    return table


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
