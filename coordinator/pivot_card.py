"""The words and numbers beside a pivot's weights: README.md, lineage.json, SHA256SUMS. Pure."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

Scores = Mapping[str, Mapping[str, float]]


def mean(values: Mapping[str, float]) -> float:
    """Mean over domains, each counted alike."""
    return sum(values.values()) / len(values)


def table(scores: Scores, *, digits: int, mark: str) -> str:
    """Markdown table models x domains with the mean; the pivot's row is bold."""
    domains = list(next(iter(scores.values())))
    head = f"| model | {' | '.join(domains)} | mean |\n|---|{'---:|' * (len(domains) + 1)}\n"
    rows = ""
    for model, by_domain in scores.items():
        cells = [f"{by_domain[d]:.{digits}f}" for d in domains] + [f"{mean(by_domain):.{digits}f}"]
        name = f"**{model}**" if model == mark else model
        rows += f"| {name} | {' | '.join(cells)} |\n"
    return head + rows


CREDIT: Final = {
    "share": "Share of the routing: how much of what the pivot was taught came from whom",
    "suspicion": "Suspicion: how far a source's words are from the public text (false_nats: nats "
    "a row of false confidence; lies: share of what it promised that the text never keeps; "
    "worst_lie: standard deviations; excluded: 1 where it was left out of the pivot)",
    "leave_one_out": "Leave one out: how much of the pivot's gain is lost without a source "
    "(1: all of it; below 0: it is better without)",
}


def credit_tables(credit: Mapping[str, Scores]) -> str:
    """Markdown tables of who contributed what; "" when nothing is known."""
    parts = [
        f"### {title}\n\n{_plain_table(credit[key])}"
        for key, title in CREDIT.items()
        if credit.get(key)
    ]
    return "## Credit\n\n" + "\n".join(parts) if parts else ""


def _plain_table(scores: Scores) -> str:
    columns = list(next(iter(scores.values())))
    head = f"| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}\n"
    rows = (
        f"| {name} | {' | '.join(f'{values[c]:.2f}' for c in columns)} |\n"
        for name, values in scores.items()
    )
    return head + "".join(rows)


def model_card(
    lineage: Mapping[str, Any],
    evals: Mapping[str, Scores],
    pivot_model: str,
    credit: Mapping[str, Scores] = MappingProxyType({}),
) -> str:
    """README.md of a pivot directory, with the front matter the Hugging Face Hub reads."""
    spec = lineage["spec"]
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags: [cofuse, model-fusion]\n---",
        f"# {lineage['name']}",
        f"Fused from {lineage['parent']} in round {lineage['round_id']} ({spec['name']}): "
        f"kind {spec['kind']}, method {spec['method']}, "
        f"{len(lineage['contributions'])} participants.",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{lineage["name"]}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{lineage["name"]}")\n```',
        "## Lineage\n\n| participant | contribution (sha256) | bytes |\n|---|---|---:|\n"
        + "".join(
            f"| {name} | `{part['sha256'][:16]}` | {part['size_bytes']:,} |\n"
            for name, part in lineage["contributions"].items()
        ),
    ]
    titles = {
        "bpb": ("Held-out bits per byte, by domain (lower is better)", 3),
        "accuracy": ("Multiple-choice accuracy, by domain (higher is better)", 3),
    }
    for key, (title, digits) in titles.items():
        if evals.get(key):
            parts.append(f"## {title}\n\n" + table(evals[key], digits=digits, mark=pivot_model))
    if told := credit_tables(credit):
        parts.append(told)
    parts.append(
        "## What was shared\n\nParticipants shipped "
        + (
            f"the top {spec['top_k']} log-probabilities of their experts on a public prompt set"
            if spec["kind"] == "logits"
            else "the weight deltas of copies of the parent trained on their own text"
        )
        + ". No private text was shipped. `lineage.json` holds every digest; "
        "`sha256sum -c SHA256SUMS` checks the files.\n\n"
        "A research model: not a medical device, not for clinical decisions."
    )
    return "\n\n".join(parts) + "\n"


def sums(digests: Mapping[str, str]) -> str:
    """SHA256SUMS as sha256sum reads it."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def canonical(value: Any) -> str:
    """JSON text with sorted keys: the same value gives the same bytes."""
    return json.dumps(value, sort_keys=True, indent=1) + "\n"
