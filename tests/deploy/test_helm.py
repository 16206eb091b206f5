"""The chart: every value is used and checked, and what it renders is what Kubernetes takes."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.own_python import python_with

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "cofuse-coordinator"
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
_RENDER = """
import json, sys
from helm_python import chart
folder, cases = sys.argv[1], json.loads(sys.argv[2])
found = []
for values in cases:
    try:
        with chart.Chart.load(folder) as loaded:
            found.append(loaded.render(values=values, name="hub"))
    except Exception as error:
        found.append(str(error))
print(json.dumps({"rendered": found, "lint": chart.lint(folder, cases[0], strict=True)}))
"""


def _paths(values: Any, at: str = "") -> set[str]:
    """Names of all settings, dotted; what holds the user's own words is one."""
    if not isinstance(values, dict) or not values:
        return {at}
    return {
        path for key, value in values.items() for path in _paths(value, f"{at}.{key}".strip("."))
    }


def test_every_value_is_used_and_every_used_one_can_be_set() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (CHART / "templates").iterdir())
    used = set(re.findall(r"\.Values\.([A-Za-z.]+)", text))
    free = {"resources"}
    wanted = {p for p in _paths(VALUES) if p.split(".")[0] not in free} | free
    assert used == wanted
    assert SCHEMA["properties"].keys() - {"global"} == VALUES.keys()
    for name in ("image", "service", "storage"):
        assert SCHEMA["properties"][name]["properties"].keys() == VALUES[name].keys()


def test_the_chart_is_of_this_release() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    project = (CHART.parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{chart["appVersion"]}"' in project


@pytest.mark.slow
def test_helm_renders_what_kubernetes_takes_and_refuses_what_is_not_meant(tmp_path: Path) -> None:
    python = python_with(tmp_path / "helm", "helm-python-sdk", "kubernetes-validate")
    good = [
        {"hosts": ["hub.example.org"]},
        {
            "hosts": ["a.example", "b.example"],
            "enroll": False,
            "service": {"type": "LoadBalancer", "enginePort": 19443},
            "storage": {"size": "1Ti", "className": "encrypted"},
            "environmentSecret": "database",
            "allowFrom": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
            "allowTo": [{"to": [{"ipBlock": {"cidr": "10.1.0.0/16"}}]}],
            "extraContainers": [{"name": "agent", "image": "agent:1"}],
            "nodeSelector": {"disk": "fast"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
        },
    ]
    bad = [{}, {"hosts": ["x"], "replicas": 2}, {"hosts": ["a b"]}]
    words = [str(python), "-c", _RENDER, str(CHART), json.dumps([*good, *bad])]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert said["lint"]["errors"] == []
    assert all(isinstance(text, str) and "schema" in text for text in said["rendered"][2:])
    for index, files in enumerate(said["rendered"][:2]):
        kinds = {}
        for name, text in files.items():
            if name.endswith(".yaml"):
                (tmp_path / f"{index}-{Path(name).name}").write_text(text)
                document = yaml.safe_load(text)
                kinds[document["kind"]] = document
        assert kinds.keys() == {"StatefulSet", "Service", "NetworkPolicy"}
        _check_pod(kinds["StatefulSet"]["spec"]["template"]["spec"])
    places = [str(path) for path in sorted(tmp_path.glob("*.yaml"))]
    validate = [str(python.with_name("kubernetes-validate")), "--strict", *places]
    done = subprocess.run(validate, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _check_pod(pod: dict[str, Any]) -> None:
    """Closed to what it does not need, as the systemd unit is."""
    assert pod["securityContext"]["runAsNonRoot"]
    assert not pod["automountServiceAccountToken"]
    for container in [*pod["initContainers"], pod["containers"][0]]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
