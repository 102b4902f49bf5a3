"""All kernels, for all architectures: without a GPU."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path

import pytest

import kernels
from kernels import registry
from kernels.compile import ARCHITECTURES, SOURCES, build
from kernels.registry import BUILDS, MODULES, Compiled, Target, compile_targets, targets

ALL = targets(ARCHITECTURES)


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> dict[Target, Compiled]:
    """What the selected tests ask for, compiled side by side; what has not changed since the last session is there."""
    here = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    wanted = [item.callspec.params["target"] for item in here if "target" in item.callspec.params]
    cache = request.config.cache
    assert cache is not None
    return {(made.build, made.architecture): made for made in compile_targets(wanted, cache.mkdir("kernels"))}


@pytest.mark.parametrize("target", ALL, ids=lambda target: f"{target[1]} {target[0]}")
def test_it_compiles_without_spills(target: Target, compiled: dict[Target, Compiled]) -> None:
    made = compiled[target]
    assert made.error is None
    assert made.kernels
    assert {name: used.spill_bytes for name, used in made.kernels.items()} == dict.fromkeys(made.kernels, 0)


def test_no_module_with_builds_is_forgotten() -> None:
    modules = [import_module(f"kernels.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)]
    assert [module for module in modules if hasattr(module, "BUILDS") and module is not registry] == list(MODULES)


def test_no_source_is_forgotten() -> None:
    assert {made.source for made in BUILDS} == {path.name for path in SOURCES.glob("*.cu")}


def test_no_build_is_named_twice() -> None:
    assert len(set(ALL)) == len(ALL)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_every_module_that_is_not_for_another(architecture: str) -> None:
    sources = {made.source for made, _ in targets([architecture])}
    others = {made.source for made in BUILDS if architecture not in made.architectures}
    assert sources | others == {made.source for made in BUILDS}


def test_a_build_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    good, bad = build("gelu.cu"), build("embedding.cu")  # which wants a WIDTH
    first, second = compile_targets([(bad, "sm_80"), (good, "sm_80")], tmp_path)
    assert first.error is not None
    assert 'identifier "WIDTH" is undefined' in first.error
    assert second == Compiled(good, "sm_80", second.kernels)
    assert second.kernels["bias_gelu"].registers > 0


def test_a_result_that_cannot_be_kept_is_an_error() -> None:
    (made,) = compile_targets([(build("gelu.cu"), "sm_80")], Path("/proc/no/such/folder"))
    assert made.error == "compiled, but could not be stored"
