"""The words and numbers beside a pivot's weights: README.md, lineage.json, SHA256SUMS. Pure."""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import yaml

from coordinator.pivot_tasks import RESULTS_FILE, TAG

_MAX_FRONT: Final = 1 << 16
_LICENSE: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,39}")
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
    "judgement": "Judgement of the pairs (agrees: share of pairs of which a source prefers the "
    "chosen answer; margin: nats by which, per token of the pivot unless the spec says otherwise; "
    "stronger: share of answers at which it is stronger than the parent; share: its part of how "
    "far the reference went from the parent; turned: below 1 for a source much louder than the "
    "others, whose distances were multiplied with it)",
    "standing": "Standing before this round (judged: rounds of its last five in which a source's "
    "words were held against the text; left_out: those it was left out of; weight: what its "
    "routing was multiplied with for that)",
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


def model_card(lineage: Mapping[str, Any], evals: Mapping[str, Any]) -> str:
    """README.md of a pivot directory, with the front matter the Hugging Face Hub reads.

    Args: lineage, evals: what is in lineage.json and evals.json.
    """
    spec = lineage["spec"]
    parts = [
        front_matter(lineage, evals),
        f"# {lineage['name']}",
        f"Fused from {lineage['parent']} in round {lineage['round_id']} ({spec['name']}): "
        f"kind {spec['kind']}, method {spec['method']}, "
        f"{len(lineage['contributions'])} participants.",
        *_use(lineage, measured="lm_eval" in evals),
        _lineage(lineage),
    ]
    for key, (title, digits) in _MEASURES.items():
        if evals.get(key):
            parts.append(f"## {title}\n\n" + table(evals[key], digits=digits, mark=evals["pivot"]))
    if "lm_eval" in evals:
        parts.append(_MEASURED[_model(lineage)["tokenizer"] == "AutoTokenizer"])
    if told := credit_tables(evals.get("credit", {})):
        parts.append(told)
    return "\n\n".join([*parts, _shared(lineage), _LIMITS]) + "\n"


_MEASURES: Final = {
    "bpb": ("Held-out bits per byte, by domain (lower is better)", 3),
    "accuracy": ("Multiple-choice accuracy, by domain (higher is better)", 3),
    "letter": ("Examination questions, by the likeliest letter (higher is better)", 3),
    "written": ("Examination questions, by the letter it writes (higher is better)", 3),
    "preference": ("Held-out pairs whose chosen answer it prefers (higher is better)", 3),
}
_COUNTED: Final = (
    f"`{RESULTS_FILE}` has the same held-out text and questions as lm-eval counts them. Accuracy "
    "is its `acc_mutual_info`. Its `bits_per_byte` leaves out the end of each document, which the "
    "table above counts, and reads documents longer than the context in windows that do not "
    "overlap. "
)
_MEASURED: Final = {
    True: _COUNTED + "The command above finds those figures again.",
    False: _COUNTED + "lm-eval itself opens tokenizers by `AutoTokenizer` and finds others.",
}
"""By whether lm-eval reads the model's own tokenizer."""
_LIMITS: Final = (
    "## Limits\n\nA research model: not a medical device, not for clinical decisions. It is "
    "measured on the domains above and on nothing else; it was not tested for bias, for harmful "
    "answers, or for following instructions."
)


def front_matter(lineage: Mapping[str, Any], evals: Mapping[str, Any]) -> str:
    """The card's YAML: what the Hub shows and searches, the scores among it."""
    merged = lineage["spec"]["method"] in ("pairwise", "merge")
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": lineage["parent"],
        "base_model_relation": "merge" if merged else "finetune",
        "tags": ["cofuse", "federated", "model-fusion"],
    }
    if license_name := _model(lineage)["license"]:
        values["license"] = license_name
    if rows := _hub_results(evals):
        values["model-index"] = [{"name": lineage["name"], "results": rows}]
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _hub_results(evals: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pivot's own scores, one result a domain."""
    own = {
        measure: evals[measure][evals["pivot"]]
        for measure in _MEASURES
        if evals["pivot"] in evals.get(measure, {})
    }
    rows = []
    for domain in own.get("bpb", {}):
        metrics = [
            {"type": measure, "name": _MEASURES[measure][0], "value": round(scores[domain], 6)}
            for measure, scores in own.items()
            if domain in scores
        ]
        dataset = {"type": "cofuse-heldout", "name": domain}
        rows.append({"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics})
    return rows


def license_of(readme: str) -> str:
    """The license that a card's front matter names; "" when it names none that is plain."""
    if not readme.startswith("---\n"):
        return ""
    head = readme[4:].partition("\n---")[0][:_MAX_FRONT]
    try:
        values = yaml.safe_load(head)
    except yaml.YAMLError:
        return ""
    found = values.get("license") if isinstance(values, dict) else None
    return found if isinstance(found, str) and _LICENSE.fullmatch(found) else ""


def model_args(lineage: Mapping[str, Any]) -> str:
    """How lm-eval must open the model to read what cofuse reads: no BOS, eos first, fp32."""
    prefix = _model(lineage)["prefix_token_id"]
    return f"pretrained=.,dtype=float32,add_bos_token=False,prefix_token_id={prefix}"


def _model(lineage: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is known of the model; a lineage.json of an earlier release says nothing."""
    return {"license": "", "tokenizer": "AutoTokenizer", "prefix_token_id": 0} | dict(
        lineage.get("model", {})
    )


def _use(lineage: Mapping[str, Any], *, measured: bool) -> list[str]:
    name, kind = lineage["name"], _model(lineage)["tokenizer"]
    code = (
        f"from transformers import AutoModelForCausalLM, {kind}\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = {kind}.from_pretrained("{name}")'
    )
    parts = [f"## Use\n\n```python\n{code}\n```"]
    if kind != "AutoTokenizer":
        return [*parts, _NOT_AUTO]
    lines = [f"transformers serve ./{name}", f"vllm serve ./{name} --served-model-name {name}"]
    if measured:
        lines.append(
            f"cd {name} && lm-eval run --model hf --model_args {model_args(lineage)} "
            f"--tasks {TAG} --include_path ."
        )
    return [*parts, "```sh\n" + "\n".join(lines) + "\n```"]


_NOT_AUTO: Final = (
    "The tokenizer is `tokenizer.json` to the letter. `AutoTokenizer`, and with it most servers, "
    "rebuild it by the rules of this architecture's maker and split text otherwise: do not use it "
    "here. `cofuse pivot chat` and `cofuse pivot export --gguf` keep to it."
)


def _lineage(lineage: Mapping[str, Any]) -> str:
    before = [
        f"| {row['name']} | {row['parent']} | {row['round_id']} | {row['method']} |"
        for row in (*lineage.get("ancestors", ()), ancestor(lineage))
    ]
    parts = [
        f"| {name} | `{part['sha256'][:16]}` | {part['size_bytes']:,} |"
        for name, part in lineage["contributions"].items()
    ]
    return "\n".join(
        [
            "## Lineage\n\n| pivot | made from | round | method |\n|---|---|---|---|",
            *before,
            "\n| participant | contribution (sha256) | bytes |\n|---|---|---:|",
            *parts,
            "\n`round.yaml` is the round's spec with the digest of every public file. The result "
            "is a function of it, the parent, the contributions and the seed alone.",
        ]
    )


def ancestor(lineage: Mapping[str, Any]) -> dict[str, str]:
    """A pivot's line in the lineage of those that come after it."""
    spec = lineage["spec"]
    own = {key: str(lineage[key]) for key in ("name", "parent", "round_id")}
    return {**own, "method": f"{spec['kind']}/{spec['method']}"}


_SHIPPED: Final = {
    "logits": "the top {top_k} log-probabilities of their experts on a public prompt set",
    "weights": "the weight deltas of copies of the parent trained on their own text",
    "pairs": "four numbers for each of the public pairs of answers",
}


def _shared(lineage: Mapping[str, Any]) -> str:
    spec = lineage["spec"]
    what = _SHIPPED[spec["kind"]].format(**spec)
    total = sum(part["size_bytes"] for part in lineage["contributions"].values())
    return (
        f"## Privacy: what was shared\n\nParticipants shipped {what}: {total:,} bytes, each let "
        "out by its own policy. No private text was shipped. Nothing here is differentially "
        "private, so no epsilon is claimed: such numbers come from models that have read private "
        "text.\n\n"
        "`lineage.json` holds every digest; `sha256sum -c SHA256SUMS` checks the files."
    )


def sums(digests: Mapping[str, str]) -> str:
    """SHA256SUMS as sha256sum reads it."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def json_text(value: Any) -> str:
    """JSON for people to read, with sorted keys: the same value gives the same bytes."""
    return json.dumps(value, sort_keys=True, indent=1) + "\n"
