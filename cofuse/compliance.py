"""What an institution hands to whoever audits it: one folder, of which every claim can be checked.

It holds what is on the institution's own record and nothing of its text: the audit chain, the
policy, the list of what left, and which file answers which clause. Legal advice it is not.
"""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Final

from participant.config import ParticipantConfig
from participant.egress import FOLDER, Release, read_records, releases
from trust.audit import AuditLog
from trust.audit_files import open_chain
from trust.chain import Entry
from trust.identity import Identity

EXPORTED: Final = "compliance.exported"
"""The act of the record that names an export by its digest."""
SUMS: Final = "SHA256SUMS"
KEEP_YEARS: Final = 6
"""HIPAA 164.316(b)(2)(i): documentation is kept six years."""


@dataclass(frozen=True, slots=True)
class Control:
    """One clause, what answers it, and where that can be seen."""

    source: str
    clause: str
    answer: str
    evidence: str
    """A file of the export, or of the repository's documentation."""


CONTROLS: Final[Sequence[Control]] = (
    Control(
        "HIPAA Security Rule",
        "164.312(a) access control, unique ids",
        "every caller has a certificate of its own; one table says who may call what",
        "docs/trust.md",
    ),
    Control(
        "HIPAA Security Rule",
        "164.312(b) audit controls",
        "hash-chained, synced, signed records; the other side remembers our head",
        "audit/",
    ),
    Control(
        "HIPAA Security Rule",
        "164.312(c) integrity",
        "files are named by their sha256; pivots and records are signed",
        "audit/, docs/trust.md",
    ),
    Control(
        "HIPAA Security Rule",
        "164.312(d) authentication, (e) transmission security",
        "mutual TLS 1.3 under the consortium's own authority; revocation within seconds",
        "docs/trust.md",
    ),
    Control(
        "HIPAA Security Rule",
        f"164.316(b)(2) documentation, {KEEP_YEARS} years",
        "nothing is ever deleted from the chain; how long its files are kept is yours to see to",
        "audit/",
    ),
    Control(
        "GDPR",
        "Art. 5(1)(c) data minimisation",
        "kinds, K, positions, rounds per prompt set are limited by the policy; text never leaves",
        "policy.toml, egress.csv",
    ),
    Control(
        "GDPR",
        "Art. 25 data protection by design and by default",
        "a missing or malformed policy denies all; it takes a rule, a budget, and a person's yes",
        "policy.toml",
    ),
    Control(
        "GDPR",
        "Art. 30 records of processing",
        "every release: when, what, how much, by which rule, who approved",
        "egress.csv",
    ),
    Control("GDPR", "Art. 32 security of processing", "see docs/trust.md, SECURITY.md", "audit/"),
    Control(
        "GDPR",
        "Art. 35 impact assessment",
        "what is not promised is written down; the assessment itself is yours",
        "docs/trust.md, docs/hospital.md",
    ),
    Control(
        "EDPB Opinion 28/2024",
        "whether a model is anonymous, case by case",
        "treat experts, log-probabilities and weights as personal data; limits are evidence only",
        "policy.toml, egress.csv",
    ),
    Control(
        "EU AI Act",
        "Art. 12, 19, 26(6) logs, six months at least",
        "automatic records of every round, release, refusal and change of the policy",
        "audit/",
    ),
    Control(
        "EU AI Act",
        "Art. 15 robustness, cybersecurity",
        "faults and bad input are tested on purpose, with published figures",
        "reliability.json of the release",
    ),
    Control(
        "ISO/IEC 27001:2022",
        "A.5.15-18, A.8.5 access; A.8.15 logging; A.8.24 cryptography",
        "as above",
        "audit/, docs/trust.md",
    ),
    Control(
        "Five Safes, SATRE",
        "safe outputs",
        "the guard: the institution's own airlock, which a researcher cannot switch off",
        "policy.toml, egress.csv",
    ),
)


def export(config: ParticipantConfig, out: Path) -> Mapping[str, str]:
    """Write the folder, and its digest onto the chain.

    Returns: sha256 of each file by its name.
    Raises: FileExistsError when `out` is there; AuditError, OSError.
    """
    out.mkdir(parents=True)
    open_chain(config.data_dir / FOLDER).export(out / "audit", lambda _record: True)
    found = list(releases(config.data_dir))
    if config.policy.exists():
        (out / "policy.toml").write_bytes(config.policy.read_bytes())
    texts = {
        "egress.csv": egress_csv(found),
        "egress.json": json.dumps([asdict(one) for one in found], indent=1) + "\n",
        "controls.md": controls_page(),
        "README.md": _readme(config, found),
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    sums = _sums(out)
    listed = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    (out / SUMS).write_text(listed, encoding="utf-8")
    actor = Identity("participant", config.name).uri
    digest = hashlib.sha256(listed.encode()).hexdigest()
    AuditLog(config.data_dir / FOLDER, actor).append(Entry(actor=actor, act=EXPORTED, obj=digest))
    return sums


def egress_csv(found: Sequence[Release]) -> str:
    """What left and what was refused, for a spreadsheet: no cell can be read as a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Release))
    for one in found:
        writer.writerow(_plain(str(cell)) for cell in astuple(one))
    return text.getvalue()


def _plain(cell: str) -> str:
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def controls_page() -> str:
    """The control map as a table."""
    rows = "".join(f"| {' | '.join(astuple(control))} |\n" for control in CONTROLS)
    head = "| source | clause | answer | evidence |\n|---|---|---|---|\n"
    return f"# Which file answers which clause\n\n{head}{rows}"


def _readme(config: ParticipantConfig, found: Sequence[Release]) -> str:
    left = [one for one in found if one.allowed]
    size, refused = sum(one.size_bytes for one in left), len(found) - len(left)
    policies = [record["obj"] for record in read_records(config.data_dir, "policy.loaded")]
    ruled = policies[-1] if policies else "none yet: no round has asked"
    return f"""# What {config.name} has let out

{len(left)} releases, {size:,} bytes; {refused} refused.
The policy that ruled last, by its sha256: {ruled}

| file | what it is | how to check it |
|---|---|---|
| audit/ | every record, signed heads, the public key | cofuse audit verify audit |
| policy.toml | the rules as they are today | sha256sum policy.toml: the digest above |
| egress.csv, egress.json | what left, what was refused | each `seq` is a record of audit/ |
| controls.md | which file answers which clause | read it beside the clause |
| {SUMS} | the digests of all of these | sha256sum -c {SUMS} |

The chain of {config.name} names this export: a record `{EXPORTED}` with the sha256 of {SUMS}. The
coordinator remembers the chain's head: ask its operator whether it is the one in audit/.
"""


def _sums(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }
