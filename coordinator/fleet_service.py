"""What participants ask. The caller is its certificate; the file is checked before it counts."""

from pathlib import Path
from typing import Any

from safetensors import safe_open

from coordinator.access import caller
from coordinator.artifacts import Artifacts
from coordinator.engine import Engine
from coordinator.store import Store
from fusion.codec import check_asked, check_logits
from fusion.contribution import ContributionError
from fusion.delta_file import check_delta
from protos.errors import CofuseError, abort
from protos.public_sets import read_prompts
from protos.spec import RoundSpec
from protos.v1 import fleet_pb2 as pb
from protos.v1 import fleet_pb2_grpc
from trust.ca import public_key_bytes


class FleetService(fleet_pb2_grpc.FleetServicer):
    """Join and CommitContribution."""

    def __init__(
        self,
        store: Store,
        artifacts: Artifacts,
        engine: Engine,
        *,
        engine_advertise: str | None = None,
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._engine = engine
        self._engine_advertise = engine_advertise

    def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinReply:
        """Bind the key of the caller's certificate to its node in the engine."""
        try:
            name = caller(context).name
            key = public_key_bytes(context.auth_context()["x509_pem_cert"][0])
            self._store.upsert_participant(name, self._engine.register(name, key), key)
            address = self._engine_advertise or self._engine.public_address
            return pb.JoinReply(engine_address=address)
        except CofuseError as error:
            abort(context, error)

    def CommitContribution(self, request: pb.CommitRequest, context: Any) -> pb.Receipt:
        """Validate the uploaded file whole and count it. The receipt comes after the disk."""
        try:
            name = caller(context).uri
            row = self._store.round(request.round_id)
            owned = self._store.artifact_kinds(request.sha256).get(name)
            if owned is None or not self._artifacts.has(request.sha256):
                raise CofuseError(
                    "unknown_artifact", f"you have uploaded no file {request.sha256[:80]}"
                )
            if request.size_bytes != owned[1]:
                raise CofuseError(
                    "bad_request", f"size_bytes: found {request.size_bytes}, wanted {owned[1]}"
                )
            spec = RoundSpec.model_validate_json(row.spec_json)
            self._check(self._artifacts.path(request.sha256), spec)
            kept = self._store.commit(
                request.round_id, caller(context).name, request.sha256, owned[1]
            )
        except CofuseError as error:
            abort(context, error)
        return pb.Receipt(
            round_id=kept.round_id,
            participant=kept.participant,
            sha256=kept.sha256,
            size_bytes=kept.size_bytes,
            committed_unix_ms=kept.committed_unix_ms,
        )

    def _check(self, path: Path, spec: RoundSpec) -> None:
        """Refuse a file that is not what the round asked for."""
        try:
            if spec.kind == "logits" and spec.prompts is not None:
                prompts = spec.prompts.removeprefix("sha256:")
                texts = [text.encode() for text in read_prompts(self._artifacts.path(prompts))]
                header = check_logits(
                    path, prompts=texts, prompt_set_sha256=prompts, top_k=spec.top_k
                )
                whole = spec.ship_share == 1
                check_asked(
                    header,
                    sampler=spec.sampler,
                    draws=spec.draws,
                    share=spec.ship_share,
                    pivot_sha256="" if whole else self._weights_of(spec.pivot),
                )
            else:
                weights = self._weights_of(spec.pivot)
                shapes = _shapes(self._artifacts.path(weights))
                check_delta(path, pivot_sha256=weights, shapes=shapes)
        except ContributionError as error:
            raise CofuseError("bad_contribution", f"{error.code}: {error}".rstrip(".")) from error

    def _weights_of(self, pivot: str) -> str:
        return next(
            f.sha256 for f in self._store.pivot(pivot).files if f.name == "model.safetensors"
        )


def _shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(weights, framework="numpy") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
