"""What can be published, and the workflow that publishes it."""

import shutil
from pathlib import Path

import pytest
import yaml

import lora_jax as lora
from scripts import release

WORKFLOW = yaml.safe_load((release.ROOT / ".github" / "workflows" / "release.yml").read_text())


@pytest.fixture
def project(tmp_path):
    """A copy of the files that state the version, with a date in the changelog."""
    for name in release.VERSIONS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(release.ROOT / name, tmp_path / name)
    changelog = (tmp_path / "CHANGELOG.md").read_text()
    heading = f"## {lora.__version__} (2030-01-31)"
    (tmp_path / "CHANGELOG.md").write_text(changelog.replace(f"## {lora.__version__} (unreleased)", heading))
    return tmp_path


def test_a_version_with_a_date_can_be_published(project):
    assert release.disagreements(f"v{lora.__version__}", project) == []


@pytest.mark.parametrize("name", release.VERSIONS)
def test_files_that_state_another_version(project, name):
    file: Path = project / name
    file.write_text(file.read_text().replace(lora.__version__, "9.9.9"))
    (sentence,) = release.disagreements(f"v{lora.__version__}", project)
    assert sentence == f"{name} states the version 9.9.9, and the tag is v{lora.__version__}"


def test_a_version_without_a_date(project):
    file = project / "CHANGELOG.md"
    file.write_text(file.read_text().replace("(2030-01-31)", "(unreleased)"))
    (sentence,) = release.disagreements(f"v{lora.__version__}", project)
    assert sentence == f"CHANGELOG.md: expected a heading '## {lora.__version__} (year-month-day)'"


def test_the_command(capsys):
    assert release.main(["v9.9.9"]) == 1
    assert capsys.readouterr().out.startswith("lora_jax/__init__.py states the version")
    assert release.main([]) == 2


def test_the_workflow_checks_before_it_publishes():
    """Only the job that publishes can get a token of the index, and it runs nothing but that."""
    build, publish = WORKFLOW["jobs"]["build"], WORKFLOW["jobs"]["publish"]
    commands = [step.get("run", "") for step in build["steps"]]
    assert WORKFLOW[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads `on` as true
    order = [
        next(i for i, run in enumerate(commands) if part in run) for part in ("release.py", "scripts/check", "uv build")
    ]
    assert order == sorted(order)
    assert WORKFLOW["permissions"] == {"contents": "read"} and "permissions" not in build
    assert publish["needs"] == "build" and publish["environment"] == "release"
    assert publish["permissions"] == {"id-token": "write"} and not any("run" in step for step in publish["steps"])
