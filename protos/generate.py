"""Makes the stubs from the .proto files: the only way to make them.

`python -m protos.generate` writes them; `--check` exits 1 when the committed ones differ.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def generate(out: Path) -> list[Path]:
    """Write the stubs of every protos/v1/*.proto below `out`; return their relative paths."""
    from grpc_tools import protoc

    sources = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "protos/v1").glob("*.proto"))
    flags = [f"--{kind}={out}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    status = protoc.main(["protoc", f"-I{ROOT}", *flags, *sources])
    if status != 0:
        raise SystemExit(f"protoc ended with status {status}: see its messages above")
    return sorted(p.relative_to(out) for p in (out / "protos/v1").glob("*_pb2*.py*"))


def main(argv: list[str]) -> int:
    """Write or, with --check, compare."""
    if argv != ["--check"]:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        stale = [
            path
            for path in generate(fresh)
            if not (ROOT / path).exists()
            or (ROOT / path).read_bytes() != (fresh / path).read_bytes()
        ]
    for path in stale:
        sys.stderr.write(f"{path} is not what the .proto says: run python -m protos.generate\n")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
