"""A release: its versions agree, its chart pins the published images, its workflow may do no more
than it must.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

from canvastune import __version__
from tools.chart_table import CHART
from tools.release import IMAGES, ROOT, main, version_problems, write_chart

WORKFLOWS = ROOT / ".github" / "workflows"
WORKFLOW = yaml.safe_load((WORKFLOWS / "release.yml").read_text(encoding="utf-8"))
JOBS: dict[str, Any] = WORKFLOW["jobs"]
REGISTRY = "ghcr.io/example"
DIGESTS = {
    image: f"sha256:{number}"
    for image, number in zip(IMAGES, ("1" * 64, "2" * 64, "3" * 64), strict=True)
}


def test_the_versions_of_package_chart_and_changelog_agree() -> None:
    assert version_problems(f"v{__version__}") == []


@pytest.mark.parametrize(
    ("file", "old"),
    [
        ("canvastune/__init__.py", f'__version__ = "{__version__}"'),
        ("charts/canvastune/Chart.yaml", f"\nversion: {__version__}"),
        ("charts/canvastune/Chart.yaml", f"\nappVersion: {__version__}"),
        ("CHANGELOG.md", f"## [{__version__}]"),
    ],
)
def test_a_version_that_differs_from_the_tag_is_found(file: str, old: str, tmp_path: Path) -> None:
    for name in ("canvastune/__init__.py", "charts/canvastune/Chart.yaml", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    text = (tmp_path / file).read_text(encoding="utf-8")
    assert text.count(old) == 1
    (tmp_path / file).write_text(text.replace(old, old.replace(__version__, "9.9.9")))
    (problem,) = version_problems(f"v{__version__}", tmp_path)
    assert problem.startswith(f"{file}: ")
    assert __version__ in problem


@pytest.mark.parametrize("tag", [__version__, f"v{__version__}-", "v1", "latest", "v9.9.9"])
def test_a_tag_that_is_no_version_of_the_files_fails_the_release(
    tag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", tag]) == 1
    assert tag.removeprefix("v") in capsys.readouterr().out


def test_the_published_chart_installs_the_images_of_the_release(tmp_path: Path) -> None:
    (tmp_path / "digests").mkdir()
    for image, digest in DIGESTS.items():
        (tmp_path / "digests" / image).write_text(f"{digest}\n")
    folder = tmp_path / "canvastune"
    chart = ["chart", str(folder), "--registry", REGISTRY, "--digests", str(tmp_path / "digests")]
    assert main(chart) == 0
    assert helm_python.lint(folder, {}, strict=True)["errors"] == []
    archive = helm_python.package(folder, destination=tmp_path)
    assert Path(archive).name == f"canvastune-{__version__}.tgz"
    served = {"serving": {"enabled": True, "model": "runs/a/model"}}
    with helm_python.Chart.load(archive) as packaged:
        text = "\n".join(packaged.render(served, name="a", namespace="b").values())
        readme = next(one for one in packaged.files if one["name"] == "README.md")
    found = set(re.findall(r'\bimage"?: "?([^\s"]+)', text))
    own = {f"{REGISTRY}/canvastune/{image}@{DIGESTS[image]}" for image in IMAGES}
    assert {image for image in found if "vllm" not in image} == own
    assert [image for image in found if "vllm" in image] == ["vllm/vllm-openai:v0.33.0"]
    about = yaml.safe_load((folder / "Chart.yaml").read_text(encoding="utf-8"))
    shown = yaml.safe_load(about["annotations"]["artifacthub.io/images"])
    assert {one["image"] for one in shown if one["name"] in IMAGES} == {
        f"{REGISTRY}/canvastune/{image}:{__version__}" for image in IMAGES
    }
    assert readme
    assert DIGESTS["mlflow"] in (folder / "README.md").read_text(encoding="utf-8")
    assert main(chart) == 1, "a folder that exists is not written into"
    unchanged = (CHART / "values.yaml").read_text(encoding="utf-8").splitlines()
    published = (folder / "values.yaml").read_text(encoding="utf-8").splitlines()
    assert sum(one != other for one, other in zip(unchanged, published, strict=True)) == 6


@pytest.mark.parametrize("digest", [None, "", "latest", "sha256:abc"])
def test_no_chart_is_published_without_the_digest_of_an_image(
    digest: str | None, tmp_path: Path
) -> None:
    digests = {name: its for name, its in DIGESTS.items() if name != "trainer"}
    if digest is not None:
        digests["trainer"] = digest
    with pytest.raises(ValueError, match="digest of trainer: "):
        write_chart(tmp_path / "canvastune", REGISTRY, digests)
    assert not (tmp_path / "canvastune").exists()


# The workflow


def steps(job: str) -> list[dict[str, Any]]:
    return list(JOBS[job]["steps"])


def test_nothing_is_built_unless_the_tag_is_on_main_and_its_version_right() -> None:
    assert WORKFLOW[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads the key `on` as true
    runs = [step.get("run", "") for step in steps("check")]
    assert 'python -m tools.release check "$GITHUB_REF_NAME"' in runs
    assert 'git merge-base --is-ancestor "$GITHUB_SHA" origin/main' in runs
    assert JOBS["images"]["needs"] == "check"
    assert set(JOBS["chart"]["needs"]) == {"check", "images"}


def test_only_the_jobs_that_publish_may_write_and_sign() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    publishing = {"contents": "read", "packages": "write", "id-token": "write"}
    assert {name: job.get("permissions") for name, job in JOBS.items()} == {
        "check": None,
        "images": publishing,
        "chart": publishing,
    }
    secrets = set(re.findall(r"secrets\.(\w+)", (WORKFLOWS / "release.yml").read_text()))
    assert secrets == {"GITHUB_TOKEN"}
    for job in JOBS:
        for step in steps(job):
            assert "${{ secrets" not in step.get("run", ""), "a command line is visible"
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False


def test_every_image_is_built_with_its_sbom_and_provenance_and_signed_by_digest() -> None:
    assert tuple(JOBS["images"]["strategy"]["matrix"]["image"]) == IMAGES
    assert {file.name for file in (ROOT / "docker").glob("*.Dockerfile")} == {
        f"{image}.Dockerfile" for image in IMAGES
    }
    (build,) = [step["with"] for step in steps("images") if "build-push" in step.get("uses", "")]
    assert (build["push"], build["sbom"], build["provenance"]) == (True, True, "mode=max")
    given = {line.split("=")[0] for line in build["build-args"].splitlines()}
    for image in IMAGES:
        text = (ROOT / "docker" / f"{image}.Dockerfile").read_text(encoding="utf-8")
        assert given <= set(re.findall(r"^ARG (\w+)", text, re.MULTILINE)), image
    for job, signed in (("images", "$IMAGE@$DIGEST"), ("chart", "/canvastune@$digest")):
        (sign,) = [step["run"] for step in steps(job) if "cosign sign" in step.get("run", "")]
        assert f'{signed}"' in sign, "a tag can be moved between push and signature"


def test_actions_have_a_version_and_files_share_it() -> None:
    versions: dict[str, set[str]] = {}
    for file in WORKFLOWS.glob("*.yml"):
        for action, version in re.findall(r"uses: ([\w./-]+)@(\S+)", file.read_text()):
            versions.setdefault(action, set()).add(version)
    assert "sigstore/cosign-installer" in versions
    for action, found in versions.items():
        assert len(found) == 1, f"{action}: {found}"
        assert re.fullmatch(r"v\d+|[0-9a-f]{40}", found.pop()), action


def test_the_documented_identity_is_that_of_this_workflow() -> None:
    page = (ROOT / "docs" / "releases.md").read_text(encoding="utf-8")
    identities = set(re.findall(r"--certificate-identity=(\S+)", page))
    expected = "/.github/workflows/release.yml@refs/tags/v"
    assert identities
    assert all(one.startswith("https://github.com/") and expected in one for one in identities)
    assert "https://token.actions.githubusercontent.com" in page
